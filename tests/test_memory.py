"""PPO's memory stays flat, and one kept tensor an iteration would be seen; `tests.benchmarks.memory` tells more."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.memory import LEAKED_BYTES, fit, measure, usual_growth

WARM_UP, WATCHED, BLOCK = 30, 45, 4


def test_a_line_is_fitted_with_its_error() -> None:
    # 0, 2, 1, 3 by hand: slope (1.5·1.5 + 0.5·0.5 − 0.5·0.5 + 1.5·1.5) / 5 = 0.8, residuals −0.3, 0.9, −0.9, 0.3,
    # their squares add up to 1.8, so the error is √(1.8 / 2 / 5).
    line = fit([0.0, 2.0, 1.0, 3.0])
    assert (line.slope, line.error, line.drift) == pytest.approx((0.8, 0.42426, 3.0), abs=1e-4)


def test_a_step_is_no_growth_and_a_leak_is() -> None:
    assert usual_growth([0.0] * 20 + [800.0] * 26, block=5) == 0.0
    assert usual_growth([10.0 * n + (800.0 if n >= 20 else 0.0) for n in range(46)], block=5) == 10.0


@pytest.mark.skipif(sys.platform != "linux", reason="a process's own memory is read from /proc; run it on Linux")
def test_ppo_keeps_nothing_of_an_iteration_and_a_leak_would_be_seen() -> None:
    samples = measure(iterations=WARM_UP + 2 * WATCHED, leak_from=WARM_UP + WATCHED)["anonymous"]
    leak = LEAKED_BYTES / 1024
    flat = usual_growth(samples[WARM_UP : WARM_UP + WATCHED], block=BLOCK)
    leaking = usual_growth(samples[WARM_UP + WATCHED :], block=BLOCK)
    assert flat < leak / 4, samples
    assert leak / 2 < leaking < 2 * leak, samples
