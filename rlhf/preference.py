"""How well scores agree with held-out preferences: overall, by source and margin, beside simple baselines.

N held-out pairs. Pure functions over numbers; `rlhf.stages.reward` makes the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rlhf.calibration import Floats, expected_calibration_error, order_agreement, reliability_bins, wilson_interval

MARGIN_BINS = 4
"""Bins of equally many pairs, where margins take more than FEW_MARGINS values."""
FEW_MARGINS = 10


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is known of held-out pairs beside their scores.

    Lengths are response tokens. margins and gold (a score of each summary that no judge's error touches, NaN
    where it is not known) come from the data alone.
    """

    chosen_tokens_N: Floats
    rejected_tokens_N: Floats
    sources: Sequence[str]
    margins_N: Floats
    gold_chosen_N: Floats
    gold_rejected_N: Floats


def preference_metrics(chosen_N: Floats, rejected_N: Floats, pairs: Pairs) -> dict[str, Any]:
    """Accuracy with its interval, baselines, calibration and loss, and the same by source and by margin.

    The confidence of a choice is sigmoid(|chosen - rejected|); a tie counts as half right.
    """
    margin_N = chosen_N - rejected_N
    right_N = order_agreement(chosen_N, rejected_N)
    longer_N = order_agreement(pairs.chosen_tokens_N, pairs.rejected_tokens_N)
    bins = reliability_bins(1 / (1 + np.exp(-np.abs(margin_N))), right_N)
    return {
        **agreement(right_N, longer_N),
        "eval_loss": float(np.logaddexp(0, -margin_N).mean()),
        "ece": expected_calibration_error(bins),
        **_noise_free(margin_N, pairs),
        "by_source": by_source(right_N, longer_N, pairs.sources),
        "by_margin": by_margin(right_N, longer_N, pairs.margins_N),
        "reliability": [row.to_row() for row in bins],
    }


def agreement(right_N: Floats, longer_N: Floats) -> dict[str, float]:
    """Accuracy with its 95 % interval, and that of "the longer one wins" on the same pairs."""
    interval = wilson_interval(float(right_N.sum()), len(right_N))
    return {
        "pairs": len(right_N),
        "accuracy": interval.share,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "longer_wins": float(longer_N.mean()),
    }


def by_source(right_N: Floats, longer_N: Floats, sources: Sequence[str]) -> dict[str, dict[str, float]]:
    """Agreement for each source, in alphabetical order."""
    source_N = np.asarray(sources, dtype=object)
    return {
        source: agreement(right_N[source_N == source], longer_N[source_N == source]) for source in sorted(set(sources))
    }


def by_margin(right_N: Floats, longer_N: Floats, margins_N: Floats) -> list[dict[str, float]]:
    """Agreement for each value of the margin or, where there are many, for bins of equally many pairs."""
    known_N = np.isfinite(margins_N)
    values = np.unique(margins_N[known_N])
    if len(values) <= FEW_MARGINS:
        bounds = [(value, value) for value in values]
    else:
        edges = np.unique(np.quantile(margins_N[known_N], np.linspace(0, 1, MARGIN_BINS + 1)))
        # An edge belongs to the bin above it, the last one to the last bin.
        bounds = [(low, np.nextafter(high, -np.inf)) for low, high in pairwise(edges)]
        bounds[-1] = (edges[-2], edges[-1])
    rows = []
    for low, high in bounds:
        member_N = known_N & (margins_N >= low) & (margins_N <= high)
        rows.append({"low": float(low), "high": float(high), **agreement(right_N[member_N], longer_N[member_N])})
    return rows


def _noise_free(margin_N: Floats, pairs: Pairs) -> dict[str, float]:
    """Agreement with the gold order, where it is known and no tie; the judge's choice plays no part."""
    gold_N = pairs.gold_chosen_N - pairs.gold_rejected_N
    known_N = np.isfinite(gold_N) & (gold_N != 0)
    if not known_N.any():
        return {}
    sign_N = np.sign(gold_N[known_N])
    longer_N = (pairs.chosen_tokens_N - pairs.rejected_tokens_N)[known_N] * sign_N
    right_N = margin_N[known_N] * sign_N
    zeros_N = np.zeros_like(right_N)
    interval = wilson_interval(float(order_agreement(right_N, zeros_N).sum()), len(right_N))
    return {
        "noise_free_pairs": len(right_N),
        "noise_free_accuracy": interval.share,
        "noise_free_accuracy_low": interval.low,
        "noise_free_accuracy_high": interval.high,
        "noise_free_longer_wins": float(order_agreement(longer_N, zeros_N).mean()),
    }
