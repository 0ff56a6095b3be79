"""What `bench` and `scaling` measure: a size, and a run with random weights that a PPO iteration can begin with.

The policy never ends by itself, so that every response has all its tokens, and every prompt is as long as the others:
the work is known to the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf.checkpoint import StageDir
from rlhf.config import Config, TinyModelConfig
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.models import create_tiny_gptj, reward_model_from_policy
from tests.benchmarks.limits import Shape
from tests.tiny_run import byte_tokenizer

NEVER = -1e4


@dataclass(frozen=True)
class Size:
    """A model and an iteration; scored counts the sequences of prompt and response that are scored alone."""

    layers: int = 6
    unfrozen: int = 2
    hidden: int = 256
    heads: int = 8
    rotary: int = 32
    vocabulary: int = 2048
    prompt: int = 90
    response: int = 48
    rollouts: int = 64
    chunk: int = 16
    minibatch: int = 16
    micro_batch: int = 16
    epochs: int = 4
    scored: int = 64
    batch_tokens: int = 16384

    @property
    def tokens(self) -> int:
        """Of a prompt and its response."""
        return self.prompt + self.response

    @property
    def steps(self) -> int:
        """Optimiser steps of an iteration."""
        return self.epochs * (self.rollouts // self.minibatch)

    def shape(self, dtype: torch.dtype) -> Shape:
        """For the limit model."""
        return Shape(self.layers, self.unfrozen, self.hidden, self.vocabulary, dtype.itemsize)


PRESETS = {
    "tiny": Size(),
    "6b": Size(
        layers=28,
        unfrozen=8,
        hidden=4096,
        heads=16,
        rotary=64,
        vocabulary=50400,
        prompt=500,
        response=50,
        rollouts=128,
        chunk=64,
        scored=256,
        batch_tokens=32768,
    ),
}
"""The recorded configuration of `ppo_iteration`, and GPT-J-6B with the prompts and summaries of trlX's example."""


def settings(size: Size, *, device: str, dtype: torch.dtype, threads: int) -> Config:
    """PPO of this size; nothing is evaluated or saved."""
    precision = str(dtype).removeprefix("torch.")
    optimizer = {"learning_rate": 5e-6, "final_learning_rate": 5e-6, "warmup_steps": 0}
    sections = {
        "prompt": {"max_prompt_tokens": size.prompt, "max_response_tokens": size.response},
        "runtime": {"device": device, "precision": precision, "tensorboard": False, "threads": threads},
        "prepare": {"batch_tokens": size.batch_tokens},
        "ppo": {
            "unfrozen_layers": size.unfrozen,
            "rollouts_per_iteration": size.rollouts,
            "rollout_chunk": size.chunk,
            "inner_epochs": size.epochs,
            "minibatch_size": size.minibatch,
            "micro_batch_size": size.micro_batch,
            "max_kl": 1e9,
            "optimizer": optimizer,
        },
    }
    return Config.model_validate(sections)


def make_run(run_dir: Path, size: Size, *, dtype: torch.dtype) -> list[EnvironmentRow]:
    """Write policy, reward model and environment; the prompts' rows, four iterations of them."""
    tokenizer = byte_tokenizer()
    policy = endless_policy(size)
    with StageDir(run_dir, "sft").publish(1, final=True) as directory:
        policy.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    with StageDir(run_dir, "reward").publish(1, final=True) as directory:
        reward_model_from_policy(StageDir(run_dir, "sft").final(), seed=2).to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    chances = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (4 * size.rollouts, size.prompt), generator=chances).tolist()
    rows = [EnvironmentRow(f"post-{number}", prompt, 0, 0.0) for number, prompt in enumerate(ids)]
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        write_environment(directory, "train", rows)
        write_environment(directory, "valid", rows[:4])
    return rows


def endless_policy(size: Size) -> PreTrainedModel:
    """A GPT-J with random weights that never writes EOS or padding."""
    tokenizer = byte_tokenizer()
    model = create_tiny_gptj(
        TinyModelConfig(layers=size.layers, hidden=size.hidden, heads=size.heads, rotary_dim=size.rotary),
        positions=size.tokens,
        vocab_size=size.vocabulary,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=1,
    )
    with torch.no_grad():
        model.lm_head.bias[[tokenizer.eos_token_id, tokenizer.pad_token_id]] = NEVER
    return model
