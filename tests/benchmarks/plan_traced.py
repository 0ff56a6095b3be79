"""The plan of GPT-J-6B itself, without its memory: `python -m tests.benchmarks.plan_traced`.

A training pass runs on fake tensors, which have shapes and no contents. Every tensor that an operation makes is counted
from then until nothing holds it, so that the most that is alive at once is known at any size, in seconds. What an
operation uses inside it is not seen; tests.benchmarks.plan measures that on small models. Powers are computed in
float32 under autocast, as on CUDA.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTJConfig

from rlhf.config import Config
from rlhf.memory_stages import NEEDS
from rlhf.memory_strategy import read_strategy
from rlhf.memory_trained import Setting
from rlhf.model_families import GPT_J_6B, shape_of
from rlhf.models import freeze_bottom
from rlhf.scoring import token_scores
from rlhf.stages.reward import pair_loss
from rlhf.stages.sft import response_nll

POWER = torch.pow
PASSES = ("forward", "loss", "top of backward", "backward")
RANDOM_FILLS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


class Counting(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the most so far."""
        self.most = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in RANDOM_FILLS:
            return args[0]  # there is nothing to fill, and fake tensors cannot
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def raised_power(base: Any, exponent: Any) -> Tensor:
    """As autocast on CUDA computes it; on the CPU it leaves 16 bits as they are."""
    in_half = isinstance(base, Tensor) and base.dtype == torch.bfloat16
    return POWER(base.float() if in_half else base, exponent)


@contextmanager
def tracing() -> Iterator[Counting]:
    """Fake tensors, counted."""
    with FakeTensorMode(), Counting() as counting, patch("torch.pow", raised_power):
        yield counting


def trace(stage: str, config: Config, settings: dict[str, Any] = GPT_J_6B) -> int:
    """The most bytes alive in the forward and backward pass of a first micro-batch, weights included."""
    section = config.sft if stage == "sft" else config.reward
    kind = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model_config = GPTJConfig(**settings, **dropout, num_labels=1, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    with tracing() as counting:
        model = kind.from_config(model_config, attn_implementation="eager").train()
        if stage == "reward":
            freeze_bottom(model, config.reward.frozen_fraction)
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        counting.restart()
        LOSSES[stage](model, config).backward()
        return counting.most


def autocast(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """A forward pass in the precision of computation, as accelerate wraps it."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            made = function(*arguments, **named)
        if isinstance(made, dict):
            made["logits"] = made["logits"].float()
        return made

    return wrapped


def sft_pass(model: nn.Module, config: Config) -> Tensor:
    """The loss of SFT on rows that are all as long as they may be."""
    prompt, tokens = config.prompt, config.prompt.max_sequence_tokens
    first = prompt.max_prompt_tokens - 1 if config.sft.loss_on == "summary" else 0
    ids_BT = torch.ones(config.sft.micro_batch_size, tokens, dtype=torch.long)
    batch = {"input_ids": ids_BT, "attention_mask": ids_BT, "labels": ids_BT}
    batch["logits_to_keep"] = torch.arange(first, tokens - 1)
    return response_nll(autocast(model, config.runtime.precision), batch)[0].sum()  # type: ignore[arg-type]


def reward_pass(model: Any, config: Config) -> Tensor:
    """The loss of the reward model on such pairs."""
    ids_BT = torch.ones(2 * config.reward.micro_batch_size, config.prompt.max_sequence_tokens, dtype=torch.long)
    scored = autocast(lambda ids, mask: token_scores(model, ids, mask), config.runtime.precision)
    return pair_loss(scored, {"input_ids": ids_BT, "attention_mask": ids_BT}, kind="last")  # type: ignore[arg-type]


LOSSES: dict[str, Callable[[Any, Config], Tensor]] = {"sft": sft_pass, "reward": reward_pass}


def planned(stage: str, config: Config, settings: dict[str, Any] = GPT_J_6B) -> int:
    """The same by the planner: one process, before it has any optimiser state."""
    setting = Setting(config, shape_of(settings, name="traced"), read_strategy(None, key=stage), 1, 1, "cuda")
    phases = [phase for phase in NEEDS[stage](setting).phases if phase.name in PASSES]
    return max(phase.total - phase.parts.get("optimiser", 0) for phase in phases)


def cases(stage: str, precision: str, checkpointing: bool, size: int) -> Config:
    """A stage's settings with the batch of one micro-batch."""
    section = {"batch_size": size, "micro_batch_size": size, "gradient_checkpointing": checkpointing}
    section |= {"loss_on": "all"} if stage == "sft" else {}
    return Config.model_validate({stage: section, "runtime": {"precision": precision}})


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace each case and print a row of the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    options = parser.parse_args(arguments)
    lines = ["| stage | precision | checkpointing | micro-batch | planned GB | traced GB | ratio |"]
    lines.append("| --- " * 7 + "|")
    print("\n".join(lines))
    for stage in LOSSES:
        for precision in ("float32", "bfloat16"):
            for checkpointing, size in ((False, 4), (True, 16)):
                config = cases(stage, precision, checkpointing, size)
                traced, ours = trace(stage, config), planned(stage, config)
                numbers = f"{ours / 1e9:.1f} | {traced / 1e9:.1f} | {ours / traced:.2f}"
                how = "yes" if checkpointing else "no"
                lines.append(f"| {stage} | {precision} | {how} | {size} | {numbers} |")
                print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
