"""Processes that fight for one stage's folder: never two writers after a takeover, and nothing is lost.

`make chaos` lets them fight for a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.chaos.fight import fight

needs_inotify = pytest.mark.skipif(
    sys.platform != "linux", reason="the order of changes in a folder is told by inotify; run it on Linux"
)


@needs_inotify
def test_paused_killed_and_with_wrong_clocks_only_one_writes_at_a_time(tmp_path: Path) -> None:
    outcome = fight(tmp_path, seconds=10, seed=1)
    assert outcome.wrong == []
    assert outcome.takeovers > 1
    assert outcome.published > 1


@needs_inotify
def test_a_writer_that_goes_on_without_its_lease_is_found_out(tmp_path: Path) -> None:
    assert fight(tmp_path, seconds=60, seed=1, fenced=False).wrong
