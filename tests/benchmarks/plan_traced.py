"""The plan of GPT-J-6B itself and of other families, without their memory: `python -m tests.benchmarks.plan_traced`.

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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from rlhf import vocabulary
from rlhf.collate import EncodedExample, EncodedPair, ExampleBatch, pack_examples, token_ids
from rlhf.config import Config
from rlhf.gptj import use_fused_attention
from rlhf.memory_stages import NEEDS
from rlhf.memory_strategy import read_strategy
from rlhf.memory_trained import Setting
from rlhf.model_families import GPT_J_6B, shape_of
from rlhf.models import freeze_bottom
from rlhf.pair_batches import PairBatch, pack_pairs
from rlhf.stages.reward import batch_scores, pair_loss
from rlhf.stages.sft import target_logprobs

POWER = torch.pow
PASSES = ("forward", "loss", "top of backward", "backward")
LIKE = {"hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "vocab_size": 32000, "intermediate_size": 5504, **LIKE},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 50432, "intermediate_size": 8192, **LIKE},
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 2048, "n_layer": 12, "n_head": 16},
}
"""Families that run padded. Of their SFT the columns of the logits are picked by contents, so it cannot be traced."""
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
    """Fake tensors, counted; the batch may be a real one. Logits are taken in chunks as on CUDA."""
    chunk = patch.object(vocabulary, "CPU_CHUNK", vocabulary.ACCELERATOR_CHUNK)
    with chunk, FakeTensorMode(allow_non_fake_inputs=True), Counting() as counting, patch("torch.pow", raised_power):
        yield counting


def trace(stage: str, config: Config, settings: dict[str, Any] = GPT_J_6B) -> int:
    """The most bytes alive in the forward and backward pass of a first micro-batch, weights included."""
    section = config.sft if stage == "sft" else config.reward
    kind = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    batch = BATCHES[stage](config)
    with tracing() as counting:
        model = kind.from_config(model_config(settings)).train()
        use_fused_attention(model)
        if stage == "reward":
            freeze_bottom(model, config.reward.frozen_fraction)
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        counting.restart()
        LOSSES[stage](model, config.runtime.precision, batch).backward()
        return counting.most


def model_config(settings: dict[str, Any]) -> PretrainedConfig:
    """As models are trained here: one label, no dropout."""
    made = AutoConfig.for_model(**settings, num_labels=1, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    for name, value in made.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(made, name, 0.0)
    return made


def autocast(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """A forward pass in the precision of computation, as accelerate wraps it."""

    def wrapped(*arguments: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return function(*arguments)

    return wrapped


def sft_batch(config: Config) -> ExampleBatch:
    """Rows that are all as long as they may be."""
    prompt, response = (token_ids([1] * count) for count in _most_tokens(config))
    examples = [EncodedExample("", prompt, response)] * config.sft.micro_batch_size
    return pack_examples(examples, loss_on=config.sft.loss_on)


def reward_batch(config: Config) -> PairBatch:
    """Such pairs."""
    prompt, response = (token_ids([1] * count) for count in _most_tokens(config))
    return pack_pairs([EncodedPair("", prompt, response, response)] * config.reward.micro_batch_size)


def _most_tokens(config: Config) -> tuple[int, int]:
    return config.prompt.max_prompt_tokens, config.prompt.max_response_tokens


def sft_pass(model: Any, precision: str, batch: ExampleBatch) -> Tensor:
    """The loss of SFT."""
    logprobs_K: Tensor = autocast(target_logprobs, precision)(model, batch)
    return -logprobs_K.sum()


def reward_pass(model: Any, precision: str, batch: PairBatch) -> Tensor:
    """The loss of the reward model."""
    return pair_loss(autocast(partial(batch_scores, model), precision), batch)  # type: ignore[arg-type]


BATCHES: dict[str, Callable[[Config], Any]] = {"sft": sft_batch, "reward": reward_batch}
LOSSES: dict[str, Callable[[Any, str, Any], Tensor]] = {"sft": sft_pass, "reward": reward_pass}


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
    lines = ["| model | stage | precision | checkpointing | micro-batch | planned GB | traced GB | ratio |"]
    lines.append("| --- " * 8 + "|")
    print("\n".join(lines))
    models = [("GPT-J-6B", "sft", GPT_J_6B), ("GPT-J-6B", "reward", GPT_J_6B)]
    for name, stage, settings in [*models, *((name, "reward", settings) for name, settings in OTHERS.items())]:
        for precision, (checkpointing, size) in product(("float32", "bfloat16"), ((False, 4), (True, 16))):
            config = cases(stage, precision, checkpointing, size)
            traced, ours = trace(stage, config, settings), planned(stage, config, settings)
            numbers = f"{ours / 1e9:.1f} | {traced / 1e9:.1f} | {ours / traced:.2f}"
            how = "yes" if checkpointing else "no"
            lines.append(f"| {name} | {stage} | {precision} | {how} | {size} | {numbers} |")
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
