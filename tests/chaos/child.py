"""Stages as processes that can be killed: forked from one that has imported everything, or begun anew as a user does.

A forked child spares the seconds of importing torch and transformers. It is a process of its own all the same: it
leads its own group, and it is the parent of nothing that another one shares.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf import checkpoint, partial
from rlhf.__main__ import main as command

STACKS_SIGNAL = signal.SIGUSR2
HANGS_AFTER_SECONDS = 120.0


class Child:
    """A running stage; its log is `log`, its stacks at the moment of `stacks()` are beside it."""

    def __init__(self, arguments: Sequence[str], log: Path, *, anew: bool) -> None:
        self.log = log
        self._stacks = log.with_suffix(".stacks")
        self._stacks.write_text("")
        self._popen: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        if anew:
            with log.open("wb") as stream:
                self._popen = subprocess.Popen(
                    [sys.executable, "-m", "rlhf", *arguments], stdout=stream, stderr=stream, start_new_session=True
                )
            self.pid = self._popen.pid
        else:
            self.pid = self._fork(arguments)

    def _fork(self, arguments: Sequence[str]) -> int:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            os.read(reading, 1)
            os.close(reading)
            return pid
        code = 1
        try:
            os.close(reading)
            os.setsid()
            descriptor = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            stacks = self._stacks.open("w")
            faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
            spy(self.log.with_suffix(".found"))
            os.close(writing)  # tells that the signal is listened for
            code = command(arguments)
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> int | None:
        """The exit code, or minus the signal that killed it; None while it runs."""
        if self._popen is not None:
            return self._popen.poll()
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, seconds: float) -> int | None:
        """As `ended`, after at most so long."""
        until = time.monotonic() + seconds
        while (code := self.ended()) is None and time.monotonic() < until:
            time.sleep(0.002)
        return code

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.ended() is None:
            os.kill(self.pid, number)

    def stacks(self) -> str:
        """What all its threads are at, newest call first; nothing for one begun anew."""
        if self._popen is not None or self.ended() is not None:
            return ""
        os.kill(self.pid, STACKS_SIGNAL)
        until = time.monotonic() + 0.1
        while not (text := self._stacks.read_text()) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.003)
        return self._stacks.read_text() or text


def spy(path: Path) -> None:
    """Have this process note what it found to go on from: a step, or how many results."""
    latest, opened = checkpoint.StageDir.latest, partial.PartialResults.__init__

    def noting_latest(stage: checkpoint.StageDir) -> tuple[int, Path] | None:
        found = latest(stage)
        note(path, f"{stage.stage} {found[0] if found else 0}")
        return found

    def noting_opened(results: partial.PartialResults, stage: checkpoint.StageDir, name: str) -> None:
        opened(results, stage, name)
        note(path, f"{stage.stage} {len(results)}")

    replace: Callable[[Any, str, Any], None] = setattr
    replace(checkpoint.StageDir, "latest", noting_latest)
    replace(partial.PartialResults, "__init__", noting_opened)


def note(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
