"""How often a reward model is right, and whether it knows: accuracy with an interval, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A share and its 95 % confidence interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence: how confident, and how often right. Means are 0 in an empty bin."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float

    def to_row(self) -> dict[str, float]:
        """The bin as plain numbers, for JSON."""
        return asdict(self)


def wilson_interval(successes: float, total: int) -> Interval:
    """The 95 % interval of a share; a tie may count as half a success.

    Raises ValueError when there is nothing to count.
    Source: Wilson 1927, "Probable inference", equation 4; without continuity correction.
    """
    if total < 1:
        raise ValueError("an interval needs at least one comparison")
    share, z_squared = successes / total, Z_95**2
    denominator = 1 + z_squared / total
    centre = (share + z_squared / (2 * total)) / denominator
    spread = Z_95 * np.sqrt(share * (1 - share) / total + z_squared / (4 * total**2)) / denominator
    return Interval(share=share, low=float(max(centre - spread, 0.0)), high=float(min(centre + spread, 1.0)))


def order_agreement(first_N: Floats, second_N: Floats) -> Floats:
    """1 where first is the larger, 0 where second is, one half where they tie."""
    right_N: Floats = np.where(first_N == second_N, 0.5, (first_N > second_N).astype(np.float64))
    return right_N


def reliability_bins(confidence_N: Floats, correct_N: Floats, *, bins: int = 10, low: float = 0.5) -> list[Bin]:
    """Group predictions by confidence into bins of equal width over [low, 1].

    A choice between two is made with a confidence of at least one half, hence `low`.
    """
    edges = np.linspace(low, 1.0, bins + 1)
    index_N = np.clip(np.searchsorted(edges, confidence_N, side="right") - 1, 0, bins - 1)
    rows = []
    for number in range(bins):
        member_N = index_N == number
        count = int(member_N.sum())
        rows.append(
            Bin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                count=count,
                confidence=float(confidence_N[member_N].mean()) if count else 0.0,
                accuracy=float(correct_N[member_N].mean()) if count else 0.0,
            )
        )
    return rows


def expected_calibration_error(rows: Sequence[Bin]) -> float:
    """Distance of confidence from accuracy, averaged over the predictions.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    total = sum(row.count for row in rows)
    return sum(row.count * abs(row.accuracy - row.confidence) for row in rows) / max(total, 1)
