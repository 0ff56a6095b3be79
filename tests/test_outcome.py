"""What a stage ends with, from what its processes left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlhf.launcher.outcome import Outcome, ended_with, leave, read_outcomes, stopped_early, verdict


def test_what_is_left_is_read(tmp_path: Path) -> None:
    leave(tmp_path, 3, 65, "row 7 is broken")
    leave(tmp_path, 10, 0, "")
    (tmp_path / "agent.json").write_text("{}")
    read = read_outcomes(tmp_path)
    assert {rank: (outcome.code, outcome.line) for rank, outcome in read.items()} == {
        3: (65, "row 7 is broken"),
        10: (0, ""),
    }
    assert read[3].time <= read[10].time


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((0, 0), 0),
        ((0, 75), 75),  # all agreed to stop, one was done
        ((75, 70), 70),
        ((70, 74), 74),  # 70: its connection broke in consequence
        ((70, 1), 1),
        ((74, 1), 74),
        ((1, 69), 1),
        ((1, 70, 78), 78),
        ((66, 65), 66),
    ],
)
def test_what_wins_and_among_equals_the_earliest(codes: tuple[int, ...], code: int) -> None:
    outcomes = [Outcome(one, f"line {one}", 100.0 + place) for place, one in enumerate(codes)]
    assert verdict(outcomes).code == code
    assert verdict(list(reversed(outcomes))).line == f"line {code}"


def test_a_process_that_left_nothing() -> None:
    killed = ended_with(-signal.SIGKILL, 5.0, local_rank=2)
    assert killed.code == 1
    assert killed.line.startswith("process 2 was ended by SIGKILL, perhaps for want of memory")
    assert "SIGSEGV; what was saved" in ended_with(-signal.SIGSEGV, 5.0, local_rank=0).line
    assert ended_with(3, 5.0, local_rank=0).line.startswith("process 0 ended with 3 without a word")
    # Before a stage listens for it, SIGTERM just ends a process; nothing was lost.
    assert ended_with(-signal.SIGTERM, 5.0, local_rank=0) == stopped_early(5.0)
    assert stopped_early(5.0).code == 75
