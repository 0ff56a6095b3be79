"""Notice that a run's `final` names something new, and say so once that has settled."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from app.problems import ProblemError
from rlhf.errors import RlhfError

logger = logging.getLogger(__name__)

Names = Mapping[str, Path]

MOST_LOOKS_SKIPPED = 64


class FinalWatcher:
    """Looks at regular times at what `final` names, and calls back when that has changed and has stayed so for one
    more look: PPO's and the reward model's may change shortly after each other.

    A callback that fails is called again as soon as the names change again, or else after 1, 2, 4 … looks more.
    """

    def __init__(
        self,
        look: Callable[[], Names],
        on_change: Callable[[], Awaitable[object]],
        *,
        served: Names,
        every_seconds: float,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """look is `published` under the service's settings; served is what that gave for what is served now."""
        self._look = look
        self._on_change = on_change
        self._every_seconds = every_seconds
        self._pause = pause
        self._handled = dict(served)
        self._seen = dict(served)
        self._failed: dict[str, Path] | None = None
        self._failures = 0
        self._looks_to_skip = 0
        self._complaint = ""

    async def run(self) -> None:
        """Watch until cancelled; errors of the file system or of the callback do not end it."""
        while True:
            await self._pause(self._every_seconds)
            names = await self._names()
            if names is not None and self._is_due(names):
                await self._call_back(names)

    async def _names(self) -> dict[str, Path] | None:
        """What `final` names now; None while that cannot be read, which is logged once."""
        try:
            names = dict(await _in_daemon_thread(self._look))
        except (RlhfError, OSError) as error:
            if str(error) != self._complaint:
                logger.warning("cannot see what final names: %s", error)
            self._complaint = str(error)
            return None
        self._complaint = ""
        return names

    def _is_due(self, names: dict[str, Path]) -> bool:
        """Whether these are new, have settled, and are not waiting after a failure."""
        settled, self._seen = names == self._seen, names
        if names != self._failed:
            self._failed, self._failures, self._looks_to_skip = None, 0, 0
        if names == self._handled or not settled:
            return False
        self._looks_to_skip -= 1
        return self._looks_to_skip < 0

    async def _call_back(self, names: dict[str, Path]) -> None:
        try:
            await self._on_change()
        except Exception as error:  # whatever it is: what is served now goes on being served
            self._failed = names
            self._looks_to_skip = min(2**self._failures, MOST_LOOKS_SKIPPED)
            self._failures += 1
            logger.warning(
                "what final names now was not taken over, next try in %d looks: %s",
                self._looks_to_skip + 1,
                error,
                exc_info=not isinstance(error, RlhfError | ProblemError),
            )
        else:
            self._handled = names


async def _in_daemon_thread(look: Callable[[], Names]) -> Names:
    """Run a function that a dead network volume may hold up for ever: neither the event loop nor the end of the
    process waits for it, as they would for a thread of the loop's own pool."""
    future: Future[Names] = Future()

    def work() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(look())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="look-at-final", daemon=True).start()
    return await asyncio.wrap_future(future)
