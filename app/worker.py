"""A model's own thread: it takes turns until it is closed, and says so when it dies or hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

NAP_SECONDS = 0.25
"""An idle thread looks up this often: deadlines pass without anybody's notice."""


class Worker:
    """Calls `turn` again and again in a thread of its own, and sleeps while there is nothing to do.

    turn works for a moment and says whether there is more to do at once; whoever brings work wakes the thread.
    on_death hears the error that ended it, in that thread.
    """

    def __init__(self, *, name: str, turn: Callable[[], bool], on_death: Callable[[BaseException], None]) -> None:
        self._turn = turn
        self._on_death = on_death
        self._woken = threading.Event()
        self._closing = False
        self._busy_since: float | None = None
        self._death: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End after the turn that is being taken; waits for it."""
        self._closing = True
        self._woken.set()
        self._thread.join()

    def wake(self) -> None:
        """There is work."""
        self._woken.set()

    def trouble(self, *, stall_seconds: float) -> str | None:
        """What is wrong with the thread, if anything: it has died, or one turn has taken longer than this."""
        if self._death is not None:
            return f"{self._thread.name} has died: {self._death}"
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > stall_seconds:
            return f"{self._thread.name} has been busy with one step for more than {stall_seconds:g} seconds"
        return None

    def _run(self) -> None:
        try:
            while not self._closing:
                self._busy_since = time.monotonic()
                self._woken.clear()  # before the turn: work that comes during it is not slept over
                more = self._turn()
                self._busy_since = None
                if not more:
                    self._woken.wait(timeout=NAP_SECONDS)
        except BaseException as error:  # whatever it is, the callers must hear of it
            self._death = f"{type(error).__name__}: {error}"
            logger.exception("%s has died", self._thread.name)
            self._on_death(error)
