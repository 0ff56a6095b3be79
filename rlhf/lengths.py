"""How long texts are, in words and tokens, as `data/summary.json` reports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

_BATCH = 1000


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, in order; equal texts are tokenised once."""
    distinct = list(dict.fromkeys(texts))
    counts = dict(zip(distinct, _counts(tokenizer, distinct), strict=True))
    return [counts[text] for text in texts]


def describe(values: Sequence[int]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum; zeros for no values."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p95": 0.0, "max": 0.0}
    return {
        "mean": round(float(np.mean(values)), 1),
        "p50": float(np.percentile(values, 50)),
        "p95": round(float(np.percentile(values, 95)), 1),
        "max": float(max(values)),
    }


def word_counts(texts: Sequence[str]) -> list[int]:
    """Words of each text, between white space."""
    return [len(text.split()) for text in texts]


def _counts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[int]:
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            texts[start : start + _BATCH],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        yield from map(len, batch["input_ids"])
