"""PPO's own checkpoints, of a tiny learner whose trained numbers are all one value: it tells which save is read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf.checkpoint import StageDir, fingerprint, verify
from rlhf.config import Config
from rlhf.models import load_policy
from rlhf.ppo_setup import Learner, build_learner
from rlhf.ppo_state import VALUE_FILE, snapshot
from rlhf.tokenizer import load_tokenizer
from rlhf.training_state import OPTIMIZER_FILE, STATE_FILE
from tests.fakes import rewarded_run, tiny_policy
from tests.tiny_run import byte_tokenizer, tiny_config

# By fingerprint: bytes that have been confirmed to be the same load the same.
KNOWN: dict[str, int] = {}


@cache
def learner() -> Learner:
    """Made once, with an optimiser that has taken a step; its numbers are overwritten each time."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = rewarded_run(Path(folder))
        with StageDir(run_dir, "sft").publish(1, final=True) as directory:
            tiny_policy().save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
        settings = tiny_config().model_dump() | {"ppo": {"unfrozen_layers": 1, "micro_batch_size": 4}}
        made = build_learner(Config.model_validate(settings), StageDir(run_dir, "ppo"))
    for weight in made.actor.trainable_parameters():
        weight.grad = torch.zeros_like(weight)
    made.strategy.step(clip=1.0)
    return made


def writer(value: int) -> Callable[[Path], None]:
    """What writes a checkpoint of iteration `value`, in which each trained weight and moment is `value`, too."""
    filled = learner()
    replicas: Any = filled.strategy
    moments = [tensor for state in replicas._optimizer.state.values() for tensor in state.values()]
    with torch.no_grad():
        for tensor in [*filled.actor.trainable_parameters(), *moments]:
            tensor.fill_(value)
    filled.iteration = value
    return snapshot(filled)


def value_of(directory: Path) -> int:
    """What a published directory holds; it verifies, loads, and is the same in all its parts."""
    verify(directory)
    known = fingerprint(directory)
    if known not in KNOWN:
        KNOWN[known] = load(directory)
    return KNOWN[known]


def load(directory: Path) -> int:
    """As a stage and the service do, every trained number of it."""
    value = int(json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))["iteration"])
    policy = dict(load_policy(directory).named_parameters())
    trained = [policy[name] for name, weight in learner().actor.policy.named_parameters() if weight.requires_grad]
    others = [tensor for name in (VALUE_FILE, OPTIMIZER_FILE) for tensor in load_file(directory / name).values()]
    assert trained
    assert all(bool((tensor == value).all()) for tensor in trained + others), f"{directory} is not all {value}"
    assert load_tokenizer(directory, key="test").eos_token_id == byte_tokenizer().eos_token_id
    return value
