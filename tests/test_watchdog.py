"""A process that hangs shows its stacks and ends, also in a call that never lets go of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.watchdog import Watchdog
from tests.conftest import REPOSITORY

HANGS = {
    "in Python": "import threading\ndef stuck_here():\n    threading.Event().wait()\nstuck_here()",
    "holding the lock": "import ctypes\ndef stuck_here():\n    ctypes.PyDLL(None).pause()\nstuck_here()",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_hang_ends_with_all_stacks_and_a_code_that_is_retried(how: str) -> None:
    code = "import rlhf.watchdog\nrlhf.watchdog.LAST_RESORT_SECONDS = 0.5\n"
    code += "with rlhf.watchdog.Watchdog(0.5):\n" + "\n".join(f"    {line}" for line in HANGS[how].split("\n"))
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "in stuck_here" in ended.stderr
    if how == "in Python":
        assert ended.stderr.splitlines()[-1].startswith("rlhf: no step was done for 0.5 s (runtime.hang_after_seconds)")


def test_a_launcher_is_told_why(tmp_path: Path) -> None:
    words = tmp_path / "words-0"
    code = "import threading\nfrom rlhf.watchdog import Watchdog\nwith Watchdog(0.3):\n    threading.Event().wait()"
    environment = os.environ | {"RLHF_LAST_WORDS": str(words)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, env=environment, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert words.read_text().startswith("rlhf: no step was done for 0.3 s")


def test_beats_keep_it_quiet() -> None:
    code = "import time\nfrom rlhf.watchdog import Watchdog\nwith Watchdog(3) as watchdog:\n"
    code += "    for _ in range(20):\n        time.sleep(0.25)\n        watchdog.beat()\nprint('done')"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_once_left_it_is_off() -> None:
    with Watchdog(0.2):
        pass
    time.sleep(0.5)
