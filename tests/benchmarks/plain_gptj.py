"""A GPT-J with random weights as transformers builds it, eager attention and all: what ours is held against."""

from __future__ import annotations

import argparse

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
