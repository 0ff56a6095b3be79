"""Bootstrap intervals: how far a mean over posts would move with other posts.

Percentile bootstrap (Efron 1979): resample the posts with replacement, take the statistic again, read off the
2.5th and 97.5th percentiles. The same seed and the same number of posts give the same resamples, so intervals
of two measurements on the same posts are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_INDICES_AT_ONCE = 2_000_000  # 16 MB: the test split of TL;DR times 1,000 resamples would take 50


@dataclass(frozen=True)
class Interval:
    """A statistic and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """As it stands in results.json."""
        return asdict(self)


def bootstrap_mean(values: ArrayLike, *, samples: int = 1000, seed: int = 0) -> Interval:
    """The mean of values and its interval.

    Raises ValueError for no values, or one that is not finite.
    """
    array = _finite(values)
    means = np.concatenate([array[rows].mean(axis=1) for rows in _resamples(len(array), samples, seed)])
    return _interval(float(array.mean()), means)


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.int64]], float], count: int, *, samples: int = 1000, seed: int = 0
) -> Interval:
    """A statistic of posts and its interval; `statistic` gets the indices of the posts to use.

    `mean` holds the statistic of all posts once each. Raises ValueError when count is 0.
    """
    if count < 1:
        raise ValueError("no values to take an interval of; give at least one")
    resampled = [statistic(row) for rows in _resamples(count, samples, seed) for row in rows]
    return _interval(float(statistic(np.arange(count))), np.asarray(resampled))


def _interval(center: float, resampled: NDArray[np.float64]) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(center, float(low), float(high))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"an interval needs a list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {len(array)} values are not finite")
    return array


def _resamples(count: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of `samples` resamples of `count` posts, some rows at a time."""
    generator = np.random.default_rng(seed)
    rows_at_once = max(_INDICES_AT_ONCE // count, 1)
    for first in range(0, samples, rows_at_once):
        yield generator.integers(0, count, size=(min(rows_at_once, samples - first), count))
