"""Work that hangs: without a sign of life for a while, a process shows all its stacks and ends, to be tried again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from rlhf.console import report_failure

EXIT_CODE = 1
LAST_RESORT_SECONDS = 10.0


class Watchdog:
    """Ends the process with exit code 1 when `beat` has not been called for `seconds`, all stacks on stderr first.

    A thread says so in one line, too. Where a call holds the interpreter's lock and never returns, no thread of
    Python's can run: then Python's own fault handler, which needs no lock, does the same a little later.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that work goes on: a step, a chunk of rollouts or a batch of an evaluation has been done."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds + LAST_RESORT_SECONDS, exit=True, file=_stderr())

    def _watch(self) -> None:
        while not self._ended.wait(max(self._last + self._seconds - time.monotonic(), 0.01)):
            if time.monotonic() - self._last >= self._seconds:
                faulthandler.dump_traceback(file=_stderr(), all_threads=True)
                report_failure(
                    f"rlhf: no step was done for {self._seconds:g} s (runtime.hang_after_seconds), so this process "
                    "hangs and ends; its stacks are above; what was saved before is still good: run the same command "
                    "again"
                )
                os._exit(EXIT_CODE)


def _stderr() -> int:
    """The descriptor, which there is also where sys.stderr has been replaced."""
    return sys.__stderr__.fileno() if sys.__stderr__ else 2
