"""What each stage process leaves for its launcher, and what follows for the whole: torchrun turns every code into 1."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.errors import PERMANENT_CODES, StopRequested

UNFORESEEN = 70
"""An exception that is not one of ours, perhaps because another process is gone: try again."""

STILL_GOOD = "what was saved before is still good"


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, the line for the user, and when (seconds since the epoch)."""

    code: int
    line: str
    time: float


def leave(folder: Path, local_rank: int, code: int, line: str) -> None:
    """Leave this process's outcome where the launcher looks."""
    beside = folder / f".{local_rank}.json"
    beside.write_text(json.dumps(asdict(Outcome(code, line, time.time()))), encoding="utf-8")
    os.replace(beside, folder / f"{local_rank}.json")


def words_of(local_rank: int) -> str:
    """The file for the last words of a process that ends itself without an outcome, as a watchdog does."""
    return f"words-{local_rank}"


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """What has been left so far, by local rank."""
    return {int(path.stem): Outcome(**json.loads(path.read_text("utf-8"))) for path in folder.glob("[0-9]*.json")}


def stopped_early(when: float) -> Outcome:
    """The outcome of a process that was asked to stop before it listened for that."""
    return Outcome(
        StopRequested.exit_code, "stopped on request before anything began; run the same command again", when
    )


def ended_with(code: int, when: float, *, local_rank: int) -> Outcome:
    """The outcome of a process that left none; a negative code is the signal that ended it."""
    if -code in (signal.SIGTERM, signal.SIGINT):
        return stopped_early(when)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code} without a word"
    hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return Outcome(1, f"process {local_rank} {how}{hint}; {STILL_GOOD}", when)


def verdict(outcomes: Iterable[Outcome]) -> Outcome:
    """What the whole ends with.

    A permanent failure of any process wins, then any other that says why, then what nobody foresaw (the
    others' connections break when one has left), then a stop on request; among equals the earliest.
    """

    def weight(outcome: Outcome) -> int:
        if outcome.code in PERMANENT_CODES:
            return 4
        return {0: 0, StopRequested.exit_code: 1, UNFORESEEN: 2}.get(outcome.code, 3)

    return min(outcomes, key=lambda outcome: (-weight(outcome), outcome.time))
