"""Waiting for a Job or a rollout: look, tell what is new, until there is a verdict or patience ends.

It looks again and again instead of keeping a watch open: a look that fails is repeated, and nothing is missed
when the API server restarts, a connection is cut or a watch expires.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rlhf.cluster.obstacles import Fact
from rlhf.cluster.snapshot import Snapshot, pause, restart_count
from rlhf.cluster.verdict import Verdict
from rlhf.errors import PERMANENT_CODES, ConflictError, PrerequisiteError, RlhfError, StopRequested, UnavailableError


@dataclass(frozen=True)
class Patience:
    """How long to wait. None: for ever."""

    stuck_after_seconds: float | None = 300.0
    deadline: float | None = None  # on the clock of time.monotonic


@dataclass(frozen=True)
class Subject:
    """What is waited for: how to look at it, what to tell of it, when it is over.

    name is as people say it (`rlhf-ppo`); again is the command that watches it once more.
    """

    name: str
    again: str
    look: Callable[[], Snapshot]
    facts: Callable[[Snapshot], list[Fact]]
    verdict: Callable[[Snapshot], Verdict | None]


@dataclass
class Watch:
    """One wait.

    tell gets each line once; show gets every snapshot, for those who follow logs. clock and pause are time's own
    but in tests.
    """

    subject: Subject
    patience: Patience
    tell: Callable[[str], None]
    show: Callable[[Snapshot], None] = lambda snapshot: None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[], None] = pause
    _told: set[tuple[str, str]] = field(default_factory=set)
    _since: dict[str, float] = field(default_factory=dict)
    _restarts: dict[str, int] = field(default_factory=dict)
    _uid: str = ""

    def wait(self) -> Verdict:
        """The verdict.

        Raises UnavailableError when something stands in the way for too long, time is up or the thing is deleted,
        and StopRequested on Ctrl-C; what is waited for goes on in all these cases.
        """
        try:
            while True:
                if verdict := self._look():
                    return verdict
                self.pause()
        except KeyboardInterrupt as error:
            raise StopRequested(
                f"stopped watching; {self.subject.name} goes on in the cluster; `{self.subject.again}` watches it again"
            ) from error

    def _look(self) -> Verdict | None:
        snapshot = self.subject.look()
        self._check_same(snapshot)
        self.show(snapshot)
        if verdict := self.subject.verdict(snapshot):
            return verdict
        facts = self.subject.facts(snapshot)
        self._tell_news(facts)
        if crash := self._hopeless(snapshot, facts):
            return crash
        self._check_patience(facts)
        return None

    def _tell_news(self, facts: Iterable[Fact]) -> None:
        """Tell each fact once; one that blocks only if it stood a look before, as most are gone in a moment."""
        for fact in facts:
            stands = not fact.blocks or fact.about in self._since
            if stands and (fact.about, fact.text) not in self._told:
                self._told.add((fact.about, fact.text))
                self.tell(str(fact))

    def _check_same(self, snapshot: Snapshot) -> None:
        """Stay with the one object that the wait began with."""
        if snapshot.owner is None and not self._uid:
            raise PrerequisiteError(f"there is no {self.subject.name} in the namespace: deploy it first")
        if snapshot.owner is None:
            raise UnavailableError(f"{self.subject.name} is gone: somebody deleted it, or its time to live is over")
        uid = snapshot.owner["metadata"]["uid"]
        if self._uid and uid != self._uid:
            raise ConflictError(f"somebody replaced {self.subject.name}; `{self.subject.again}` watches the new one")
        self._uid = uid

    def _hopeless(self, snapshot: Snapshot, facts: Iterable[Fact]) -> Verdict | None:
        """A container that started again while we watched, and ended with a code that does not mend itself."""
        now = {pod["metadata"]["uid"]: restart_count(pod) for pod in snapshot.pods}
        began = {uid: self._restarts.setdefault(uid, count) for uid, count in now.items()}
        if all(count == began[uid] for uid, count in now.items()):
            return None
        crash = next((fact for fact in facts if fact.exit_code in PERMANENT_CODES), None)
        return Verdict(crash.exit_code, str(crash)) if crash else None

    def _check_patience(self, facts: Iterable[Fact]) -> None:
        now = self.clock()
        blocking = {fact.about: fact for fact in facts if fact.blocks}
        self._since = {about: self._since.get(about, now) for about in blocking}
        limit, deadline = self.patience.stuck_after_seconds, self.patience.deadline
        for about, since in self._since.items():
            if limit is not None and now - since >= limit:
                raise _stuck(blocking[about], f"{limit:.0f} seconds", self.subject)
        if deadline is not None and now >= deadline:
            if blocking:
                raise _stuck(next(iter(blocking.values())), "the time given with --timeout", self.subject)
            raise UnavailableError(
                f"time is up (--timeout): {self.subject.name} goes on in the cluster; `{self.subject.again}` watches it"
            )


def _stuck(fact: Fact, how_long: str, subject: Subject) -> RlhfError:
    """The error for something that stood in the way all the time."""
    error = UnavailableError(f"{fact} [for {how_long}; {subject.name} stays, and goes on once this is mended]")
    error.exit_code = fact.exit_code
    return error
