"""A GPT-J with random weights as transformers builds it, eager attention and all: what ours is held against."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPTJConfig, PreTrainedModel

PAD_ID = 0


def plain_gptj(options: argparse.Namespace, kind: type[PreTrainedModel], *, spread: float = 0.02) -> PreTrainedModel:
    """Of the shape, device and dtype of the options, for prompts and responses up to twice as long as theirs.

    spread is the deviation of the weights. It has no EOS of its own, and one label where it is a classifier.
    """
    config = GPTJConfig(
        vocab_size=options.vocabulary,
        n_positions=2 * (options.prompt + options.response),
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=options.heads,
        rotary_dim=options.rotary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=spread,
        num_labels=1,
        bos_token_id=PAD_ID,
        eos_token_id=None,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return kind(config).to(getattr(torch, options.dtype))  # type: ignore[arg-type]


def size_options(name: str, *, rows: int) -> argparse.ArgumentParser:
    """The options of a benchmark beside `plain_gptj`: its size, threads, repeats, device and dtype, and JSON."""
    options = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.{name}")
    numbers = {
        "layers": 6, "hidden": 256, "heads": 8, "rotary": 32, "vocabulary": 2048, "rows": rows, "prompt": 90,
        "response": 48, "threads": 1, "repeats": 5,
    }  # fmt: skip
    for number, default in numbers.items():
        options.add_argument(f"--{number}", type=int, default=default)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--json", type=Path, help="write the numbers there, too")
    return options
