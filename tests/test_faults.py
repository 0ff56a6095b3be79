"""Every system call of a save fails once in turn: what was saved before stays good, and the next start goes on.

`make chaos` tries every call in every way; here each is tried in one.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.faults.trap import missing


def inject(*options: str) -> tuple[int, int, int, str]:
    """Exit code, points tried, points at which something was lost, and all that was printed."""
    if lacking := missing():
        pytest.skip(lacking)
    command = [sys.executable, "-m", "tests.faults", "--sample", *options]
    ended = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    last = re.search(r"points tried: (\d+), lost: (\d+)", ended.stdout)
    assert last, ended.stderr
    return ended.returncode, int(last[1]), int(last[2]), ended.stdout


def test_whatever_fails_in_a_save_or_a_start_nothing_is_lost() -> None:
    scenarios = ("the final one", "a start after damage", "a repair", "between saves")
    code, tried, lost, told = inject(*(word for name in scenarios for word in ("--scenario", name)))
    assert (code, lost) == (0, 0), told
    assert tried > 200


def test_a_careless_save_is_found_out() -> None:
    code, tried, lost, told = inject("--scenario", "a careless save")
    assert code == 1
    assert lost > tried / 3
    for way in ("ENOSPC: ", "killed before it", "power lost after it"):
        assert way in told
