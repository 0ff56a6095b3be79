"""Models on their way into trlX and out of it, and what a run needs to go on after a stop. Nothing ours is pickled.

Needs no trlX: a trainer is taken as what it holds (`model`, `opt`, `scheduler`, `kl_ctl`, `running_moments`).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.health import check_finite
from rlhf.models import load_policy
from rlhf.ppo_setup import VALUE_FILE
from rlhf.training_state import OPTIMIZER_FILE, STATE_FILE, load_optimizer_tensors, optimizer_tensors

TRLX_WEIGHTS = "pytorch_model.bin"


def trlx_copy(model: Path, target: Path) -> Path:
    """A directory that trlX loads: links to a model's files, and beside them a pytorch_model.bin of nothing.

    trlX takes the policy from transformers, which reads the safetensors, and insists on that file for a value head
    and a reference that it saved itself, which there are none of yet. Whole weights in it would be read a second
    time and then not used.
    """
    target.mkdir(parents=True)
    for file in model.resolve().iterdir():
        (target / file.name).symlink_to(file)
    torch.save({}, target / TRLX_WEIGHTS)
    return target


def policy_of(trainer: Any) -> Any:
    """The language model that trlX trains, as transformers knows it: without value head and reference."""
    return trainer.accelerator.unwrap_model(trainer.model).base_model


def write_trainer(directory: Path, trainer: Any, tokenizer: PreTrainedTokenizerBase, numbers: dict[str, Any]) -> None:
    """Save the trained policy as every other stage's is, and beside it what `read_trainer` puts back.

    trlX's own export names the weights `base_model.*`, so that AutoModel finds none of them and makes up others.
    Raises DivergedError for weights that are not finite.
    """
    policy, value = policy_of(trainer), _value_head(trainer).state_dict()
    check_finite(policy.state_dict() | value)
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_file(_on_host(value), directory / VALUE_FILE)
    save_file(_on_host(optimizer_tensors(trainer.opt)), directory / OPTIMIZER_FILE)
    moments = trainer.running_moments
    trlx = {
        "kl_coef": float(trainer.kl_ctl.value),
        "moments": {name: float(getattr(moments, name)) for name in ("mean", "std", "var", "count")},
    }
    (directory / STATE_FILE).write_text(json.dumps(numbers | {"trlx": trlx}, indent=1), encoding="utf-8")


def read_trainer(directory: Path, trainer: Any, *, steps: int) -> None:
    """Put a fresh trainer where a checkpoint left off, its schedule after so many optimiser steps.

    The random generators are not part of it: see `settings.trlx_settings`.
    """
    policy_of(trainer).load_state_dict(load_policy(directory).state_dict())
    _value_head(trainer).load_state_dict(load_file(directory / VALUE_FILE))
    load_optimizer_tensors(trainer.opt, load_file(directory / OPTIMIZER_FILE))
    schedule = getattr(trainer.scheduler, "scheduler", trainer.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects the optimiser to step, too, which it did before the stop
        for _ in range(steps):
            schedule.step()
    saved = read_numbers(directory)["trlx"]
    trainer.kl_ctl.value = saved["kl_coef"]
    for name, value in saved["moments"].items():
        setattr(trainer.running_moments, name, torch.tensor(value))


def read_numbers(directory: Path) -> dict[str, Any]:
    """The numbers of a checkpoint."""
    numbers: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    return numbers


def _value_head(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model).v_head


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
