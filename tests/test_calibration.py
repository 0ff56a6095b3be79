"""Expected numbers: Wilson intervals recorded from statsmodels, and bins worked out by hand."""

import numpy as np
import pytest

from rlhf.calibration import expected_calibration_error, order_agreement, reliability_bins, wilson_interval


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # Recorded from statsmodels 0.15.0, proportion_confint(method="wilson").
        (81, 263, 0.2552885198782742, 0.36620957698280004),
        (15, 148, 0.06238639953073628, 0.16048724172330803),
        (0, 20, 0.0, 0.1611251580528194),
        (29, 29, 0.8830302015002592, 1.0),
    ],
)
def test_wilson_interval_equals_recorded_values(successes, total, low, high):
    interval = wilson_interval(successes, total)
    assert interval.share == successes / total
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


def test_wilson_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one comparison"):
        wilson_interval(0, 0)


def test_a_tie_agrees_by_half():
    first, second = np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0])
    assert order_agreement(first, second).tolist() == [1.0, 0.0, 0.5]


def test_bins_hold_mean_confidence_and_accuracy():
    confidence = np.array([0.5, 0.6, 0.8, 0.9, 1.0])
    correct = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    lower, upper = reliability_bins(confidence, correct, bins=2)
    assert (lower.low, lower.high, lower.count) == (0.5, 0.75, 2)
    assert (upper.low, upper.high, upper.count) == (0.75, 1.0, 3)
    assert lower.confidence == pytest.approx(0.55)
    assert lower.accuracy == pytest.approx(0.5)
    assert upper.confidence == pytest.approx(0.9)
    assert upper.accuracy == pytest.approx(2 / 3)


def test_calibration_error_is_the_mean_gap_over_predictions():
    confidence = np.array([0.5, 0.6, 0.8, 0.9, 1.0])
    correct = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    # (2 * |0.5 - 0.55| + 3 * |2/3 - 0.9|) / 5 = (0.1 + 0.7) / 5
    assert expected_calibration_error(reliability_bins(confidence, correct, bins=2)) == pytest.approx(0.16)


def test_an_empty_bin_weighs_nothing():
    rows = reliability_bins(np.array([0.95, 0.95]), np.array([1.0, 1.0]), bins=10)
    assert [row.count for row in rows] == [0] * 9 + [2]
    assert expected_calibration_error(rows) == pytest.approx(0.05)
