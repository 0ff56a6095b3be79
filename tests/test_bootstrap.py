"""Bootstrap intervals against the normal approximation and exact cases."""

from typing import Any

import numpy as np
import pytest

from rlhf import bootstrap
from rlhf.bootstrap import Interval, bootstrap_mean, bootstrap_statistic


def test_constant_values_have_no_width() -> None:
    assert bootstrap_mean([2.5] * 7) == Interval(2.5, 2.5, 2.5)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.arange(400) % 2  # a fair coin: deviation 0.5, standard error 0.025
    interval = bootstrap_mean(values, samples=4000)
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert interval.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_same_seed_same_interval() -> None:
    values = np.linspace(0, 1, 50) ** 2
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_a_statistic_of_indices_agrees_with_the_mean() -> None:
    values = np.linspace(0, 1, 50) ** 2
    interval = bootstrap_statistic(lambda index: float(values[index].mean()), 50, samples=300, seed=3)
    expected = bootstrap_mean(values, samples=300, seed=3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_working_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0, 1, 50) ** 2
    whole = bootstrap_mean(values, samples=120)
    monkeypatch.setattr(bootstrap, "_INDICES_AT_ONCE", 50 * 7)
    assert bootstrap_mean(values, samples=120) == whole


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_what_has_no_mean_is_refused(values: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"finite|shape"):
        bootstrap_mean(values)


def test_no_posts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_statistic(lambda index: 0.0, 0)
