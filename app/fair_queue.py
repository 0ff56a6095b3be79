"""Work that waits for a model, and whose turn it is.

Calls take turns: from a call of 200 posts and one of a single post, the single one is served second, not 201st.
What is batched with padding is of like length, so that little is computed for it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from app.problems import INVALID_REQUEST, QUEUE_FULL, ProblemError
from app.schemas import FinishReason
from rlhf.sampling import Sampling

LOOK_AHEAD = 128
"""From so many of those next in turn the ones of like length are chosen."""

MAX_RETRY_SECONDS = 60.0
"""A caller is never told to stay away longer: what is ahead of it may vanish."""


@dataclass(eq=False)
class Job:
    """One sequence on its way through a model: a prompt to be continued, or a sequence to be scored.

    call groups the jobs of one request. cost is counted against the queue's limit, in tokens: what is read and what
    may be written. outcome is set in the event loop, or cancelled by whoever has lost interest.
    """

    call: Hashable
    ids: Sequence[int] = field(repr=False)
    cost: int
    outcome: asyncio.Future[Outcome]
    sampling: Sampling | None = None
    seed: tuple[int, ...] = ()
    on_token: Callable[[int], None] | None = None
    written: list[int] = field(default_factory=list, repr=False)
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the outcome any more."""
        return self.outcome.cancelled()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the tokens and how they ended, or the score."""

    tokens: Sequence[int] = ()
    finish: FinishReason = "stop"
    score: float = math.nan


class FairQueue:
    """Jobs that wait, bounded in tokens. Not thread-safe: its owner holds a lock."""

    def __init__(self, *, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._calls: OrderedDict[Hashable, OrderedDict[Job, None]] = OrderedDict()
        self._tokens = 0
        self._count = 0

    def __len__(self) -> int:
        """Jobs that wait."""
        return self._count

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return self._tokens

    def put(self, jobs: Sequence[Job], *, tokens_per_second: float | None = None, bounded: bool = True) -> None:
        """Line up all of these or none; ProblemError with a time to come back when there is no room.

        bounded=False is for work that was accepted before, of which this is the next part.
        """
        cost = sum(job.cost for job in jobs)
        if bounded and cost > self._max_tokens:
            detail = f"the request is {cost} tokens of work and {self._max_tokens} fit into the queue"
            raise ProblemError(INVALID_REQUEST, f"{detail}; send it in several parts")
        if bounded and self._tokens + cost > self._max_tokens:
            seconds = self._tokens / tokens_per_second if tokens_per_second else 1.0
            raise ProblemError(
                QUEUE_FULL,
                f"{self._tokens} tokens are waiting and {cost} more would pass the limit of {self._max_tokens}",
                retry_after=min(max(seconds, 1.0), MAX_RETRY_SECONDS),
            )
        for job in jobs:
            self._calls.setdefault(job.call, OrderedDict())[job] = None
        self._tokens += cost
        self._count += len(jobs)

    def take(self, *, count: int, tokens: int, padded: bool = True) -> list[Job]:
        """The job whose turn it is, and as many as fit into its batch; they leave the queue.

        padded: those of like length, and tokens bounds the batch with its padding, where equal prompts count once.
        Else those whose turn comes next, so that what a call has to say of one post stays together; tokens bounds
        what they are long. The first job is taken always.
        """
        if not self._count or count < 1:
            return []
        chosen = self._alike(count, tokens) if padded else self._next(count, tokens)
        for job in chosen:
            self._remove(job)
        for call in dict.fromkeys(job.call for job in chosen):
            if call in self._calls:
                self._calls.move_to_end(call)
        return chosen

    def take_if(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """The jobs of which this is true; they leave the queue."""
        found = [job for jobs in self._calls.values() for job in jobs if unwanted(job)]
        for job in found:
            self._remove(job)
        return found

    def _alike(self, count: int, tokens: int) -> list[Job]:
        first, *others = islice(self._in_turn(), LOOK_AHEAD)
        others.sort(key=lambda job: abs(len(job.ids) - len(first.ids)))
        chosen, distinct, width = [first], {id(first.ids)}, len(first.ids)
        for job in others:
            if len(chosen) == count:
                break
            wider = max(width, len(job.ids))
            more = distinct | {id(job.ids)}
            if wider * len(more) > tokens:
                break
            chosen.append(job)
            distinct, width = more, wider
        return chosen

    def _next(self, count: int, tokens: int) -> list[Job]:
        chosen: list[Job] = []
        filled = 0
        for job in islice(self._in_turn(), count):
            filled += len(job.ids)
            if chosen and filled > tokens:
                break
            chosen.append(job)
        return chosen

    def _in_turn(self) -> Iterator[Job]:
        """Every call's first job, then every call's second, and so on."""
        rounds = [iter(jobs) for jobs in self._calls.values()]
        while rounds:
            still = []
            for jobs in rounds:
                if (job := next(jobs, None)) is not None:
                    still.append(jobs)
                    yield job
            rounds = still

    def _remove(self, job: Job) -> None:
        jobs = self._calls[job.call]
        del jobs[job]
        if not jobs:
            del self._calls[job.call]
        self._tokens -= job.cost
        self._count -= 1
