"""What watches a loop from outside: requests to stop, and work that hangs."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.runtime import agreed
from rlhf.stopping import StopSignal
from rlhf.watchdog import Watchdog


class Interrupted(Exception):
    """Somebody asked to stop, and the learner is as a checkpoint can keep it."""


@dataclass(frozen=True)
class Oversight:
    """What watches the loop: requests to stop, work that hangs."""

    stop: StopSignal
    watchdog: Watchdog

    def asked(self) -> bool:
        """Between two pieces of work, on all processes: whether any was asked to stop; a sign of life, too.

        Then all are: the signal that a launcher sends once another node has left finds this one on its way.
        """
        self.watchdog.beat()
        asked = agreed(self.stop.requested)
        if asked:
            self.stop.request()
        return asked

    def heed(self) -> None:
        """As `asked`, but raises Interrupted."""
        if self.asked():
            raise Interrupted
