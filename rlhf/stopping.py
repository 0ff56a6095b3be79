"""Stopping on request: SIGTERM or SIGINT end a stage with its state saved, and exit code 75."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

from rlhf.errors import StopRequested
from rlhf.processes import process_count

logger = logging.getLogger(__name__)


class StopSignal:
    """Where nothing needs saving, as in loading, the first signal ends the process; in a loop it waits for the step.

    A second signal changes nothing. `interrupted` tells that the first one has ended what was being done.
    """

    def __init__(self) -> None:
        self.requested = self.interrupted = False
        self._deferred = False

    def install(self) -> None:
        """Listen."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, a signal is only remembered: the block looks at `requested`, saves and leaves."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    def together(self) -> AbstractContextManager[None]:
        """As `deferred` where many processes share the stage; nothing alone, where the first signal ends the process.

        One of many that left at once would break the others' connections, and they would end with a failure.
        """
        return self.deferred() if process_count() > 1 else nullcontext()

    def request(self) -> None:
        """Ask to stop, as a signal in a loop would."""
        self.requested = True

    def check(self) -> None:
        """Raise StopRequested when a signal has come; for places where nothing needs saving."""
        if self.requested:
            raise StopRequested("stopped on request; run the same command again to continue")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self.requested = True
        if not self._deferred:
            self.interrupted = True
            raise KeyboardInterrupt  # not an Exception: a library that is loading something might catch that
        # In a thread, since the signal may have come in the middle of a write to stderr.
        name = signal.Signals(number).name
        threading.Thread(target=logger.info, args=("%s received: finishing the step and saving", name)).start()
