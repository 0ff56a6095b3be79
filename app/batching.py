"""All callers' work in shared batches: a queue and a thread for each policy, and for the reward model.

The event loop submits jobs and is told their outcomes; the model runs in the thread only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.fair_queue import FairQueue, Job, Outcome
from app.metrics import Metrics
from app.problems import (
    ENGINE_DEAD,
    INTERNAL,
    INVALID_REQUEST,
    SCORE_NOT_FINITE,
    WAITED_TOO_LONG,
    ProblemError,
)
from app.worker import Worker
from rlhf.scoring import Scorer
from rlhf.slots import NextToken, Request, RunningBatch

logger = logging.getLogger(__name__)

Settled = tuple[Job, Outcome | ProblemError]

RATE_SECONDS = 1.0
"""The speed of the work is measured over so many seconds in which there was some."""

SWEEP_SECONDS = 0.05
"""How often the queue is searched for jobs that wait in vain."""

MOST_SCORED = 1024
"""Sequences scored in one turn, however short."""


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """tokens may wait in a queue, none of them longer than seconds; batch_tokens are computed at a time."""

    tokens: int
    seconds: float
    batch_tokens: int


class JobQueue:
    """Jobs waiting for one model; the event loop fills it, the model's thread empties it."""

    def __init__(self, *, model: str, limits: QueueLimits, metrics: Metrics, padded: bool) -> None:
        """padded: whether the model computes the jobs of a batch side by side, each as long as the longest."""
        self._loop = asyncio.get_running_loop()
        self._padded = padded
        self._model = model
        self._limits = limits
        self._metrics = metrics
        self._lock = threading.Lock()
        self._waiting = FairQueue(max_tokens=limits.tokens)
        self._tokens_per_second: float | None = None
        self._done_tokens, self._busy_seconds = 0, 0.0
        self._next_sweep = 0.0
        self._death: str | None = None

    def put(self, jobs: Sequence[Job], *, bounded: bool) -> None:
        """Line up all of these or none. Raises ProblemError when there is no room or the model's thread has died."""
        with self._lock:
            if self._death is not None:
                raise ProblemError(ENGINE_DEAD, self._death)
            self._waiting.put(jobs, tokens_per_second=self._tokens_per_second, bounded=bounded)
            waiting = len(self._waiting)
        self._metrics.set_waiting(self._model, waiting)

    @property
    def waiting(self) -> bool:
        """Whether there are jobs whose turn has not come."""
        return len(self._waiting) > 0

    def take(self, count: int) -> list[Job]:
        """The next batch, of `count` jobs at most."""
        self._sweep()
        with self._lock:
            if count >= 1:
                self._waiting.take_if(lambda job: job.abandoned)
            jobs = self._waiting.take(count=count, tokens=self._limits.batch_tokens, padded=self._padded)
            waiting = len(self._waiting)
        now = time.monotonic()
        self._metrics.set_waiting(self._model, waiting)
        for job in jobs:
            self._metrics.left_queue(self._model, now - job.queued_at)
        return jobs

    def finished(self, jobs: Sequence[Job], *, busy_seconds: float) -> None:
        """Learn how fast work is done, from which a refused caller is told when to come back."""
        self._done_tokens += sum(job.cost for job in jobs)
        self._busy_seconds += busy_seconds
        if self._busy_seconds >= RATE_SECONDS:
            self._tokens_per_second = self._done_tokens / self._busy_seconds
            self._done_tokens, self._busy_seconds = 0, 0.0

    def fail(self, error: BaseException, running: Sequence[Job]) -> None:
        """The thread has died: settle what runs and what waits, and refuse what comes."""
        with self._lock:
            self._death = f"the thread of model {self._model} has died ({type(error).__name__})"
            waiting = self._waiting.take_if(lambda job: True)
        self._metrics.set_waiting(self._model, 0)
        self._metrics.set_running(self._model, 0)
        self.settle([(job, ProblemError(ENGINE_DEAD, self._death)) for job in (*running, *waiting)])

    def _sweep(self) -> None:
        """Settle what waits in vain: jobs that nobody wants any more, or that have waited too long."""
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_SECONDS
        oldest = now - self._limits.seconds
        with self._lock:
            self._waiting.take_if(lambda job: job.abandoned)
            late = self._waiting.take_if(lambda job: job.queued_at < oldest)
        detail = f"its turn did not come within {self._limits.seconds:g} seconds"
        self.settle([(job, ProblemError(WAITED_TOO_LONG, detail)) for job in late])

    def settle(self, settled: Sequence[Settled]) -> None:
        """Tell the event loop what became of jobs."""
        if settled:
            self.call_soon(lambda: _set_outcomes(settled))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run this in the event loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _set_outcomes(settled: Sequence[Settled]) -> None:
    for job, outcome in settled:
        if job.outcome.done():
            continue
        if isinstance(outcome, ProblemError):
            job.outcome.set_exception(outcome)
        else:
            job.outcome.set_result(outcome)


class GenerationQueue:
    """Summaries by one policy: jobs join its running batch as rows fall free, between any two tokens."""

    def __init__(self, batch: RunningBatch, *, model: str, limits: QueueLimits, metrics: Metrics) -> None:
        """Call it in the event loop."""
        self._model = model
        self._batch = batch
        self._metrics = metrics
        self._queue = JobQueue(model=model, limits=limits, metrics=metrics, padded=True)
        self._joining: list[Job] = []
        self._running: dict[int, Job] = {}
        self._next_key = 0
        self.worker = Worker(name=f"generate-{model}", turn=self._turn, on_death=self._die)
        self.worker.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Line up all of these or none; ProblemError when the queue is full."""
        self._queue.put(jobs, bounded=True)
        self.worker.wake()

    def close(self) -> None:
        """End the thread; what has not been settled never will be."""
        self.worker.close()

    def _turn(self) -> bool:
        """Let in what has room, write one token of everything; whether there is more to do."""
        begun = time.monotonic()
        self._drop_abandoned()
        self._joining = jobs = self._queue.take(self._batch.room)
        finished = self._deliver(self._admit(jobs))
        self._joining = []
        self._metrics.set_running(self._model, len(self._running))
        if self._running:
            self._metrics.step(self._model, len(self._running))
            finished += self._deliver(self._batch.step())
        self._metrics.set_running(self._model, len(self._running))
        self._queue.finished(finished, busy_seconds=time.monotonic() - begun)
        return bool(self._running or jobs or self._queue.waiting)

    def _drop_abandoned(self) -> None:
        gone = [key for key, job in self._running.items() if job.abandoned]
        if gone:
            self._batch.abort(gone)
            for key in gone:
                del self._running[key]

    def _admit(self, jobs: Sequence[Job]) -> list[NextToken]:
        if not jobs:
            return []
        keyed = dict(enumerate(jobs, start=self._next_key))
        self._next_key += len(jobs)
        try:
            news = self._batch.add({key: _request(job) for key, job in keyed.items()})
        except ValueError as error:
            if len(jobs) == 1:
                self._queue.settle([(jobs[0], ProblemError(INVALID_REQUEST, str(error)))])
                return []
            # None has joined: find the one that the model cannot take, and serve the others.
            return [new for job in jobs for new in self._admit([job])]
        self._running |= keyed
        return news

    def _deliver(self, news: Sequence[NextToken]) -> list[Job]:
        """Tell the event loop; the jobs that finished."""
        settled: list[Settled] = []
        spoken: list[tuple[Job, int]] = []
        for new in news:
            job = self._running[new.key]
            if new.finish != "failed":
                if not job.written:
                    self._metrics.first_token(self._model, time.monotonic() - job.queued_at)
                job.written.append(new.token)
                if job.on_token is not None:
                    spoken.append((job, new.token))
            if new.finish is not None:
                settled.append((job, self._outcome(new, job)))
                del self._running[new.key]
        if spoken:
            self._queue.call_soon(lambda: _speak(spoken))
        self._queue.settle(settled)
        return [job for job, _ in settled]

    def _outcome(self, new: NextToken, job: Job) -> Outcome | ProblemError:
        if new.finish == "failed":
            logger.error("model %s gave logits that are not finite", self._model)
            return ProblemError(INTERNAL, f"the output of model {self._model} is not finite for one of the posts")
        return Outcome(tokens=tuple(job.written), finish="stop" if new.finish == "stop" else "length")

    def _die(self, error: BaseException) -> None:
        self._queue.fail(error, [*self._joining, *self._running.values()])
        self._joining, self._running = [], {}


class ScoringQueue:
    """Scores by the reward model, in batches over all callers; the scorer computes a prompt once for its summaries."""

    def __init__(self, scorer: Scorer, *, model: str, limits: QueueLimits, metrics: Metrics) -> None:
        """Call it in the event loop."""
        self._model = model
        self._scorer = scorer
        self._metrics = metrics
        self._queue = JobQueue(model=model, limits=limits, metrics=metrics, padded=False)
        self._running: list[Job] = []
        self.worker = Worker(name=f"score-{model}", turn=self._turn, on_death=self._die)
        self.worker.start()

    def submit(self, jobs: Sequence[Job], *, accepted: bool = False) -> None:
        """Line up all of these or none; ProblemError when the queue is full.

        accepted: they complete work that was accepted before, and are taken even then.
        """
        self._queue.put(jobs, bounded=not accepted)
        self.worker.wake()

    def close(self) -> None:
        """End the thread; what has not been settled never will be."""
        self.worker.close()

    def _turn(self) -> bool:
        """Score one batch; whether there was one."""
        self._running = self._queue.take(MOST_SCORED)
        if not self._running:
            return False
        begun = time.monotonic()
        self._metrics.batch_scored(len(self._running), sum(len(job.ids) for job in self._running))
        self._metrics.set_running(self._model, len(self._running))
        outcomes = self._score(self._running)
        self._queue.finished(self._running, busy_seconds=time.monotonic() - begun)
        self._queue.settle(list(zip(self._running, outcomes, strict=True)))
        self._running = []
        self._metrics.set_running(self._model, 0)
        return True

    def _score(self, jobs: Sequence[Job]) -> list[Outcome | ProblemError]:
        try:
            scores = self._scorer.score([job.ids for job in jobs], allow_nonfinite=True)
        except ValueError as error:
            if len(jobs) == 1:
                return [ProblemError(INVALID_REQUEST, str(error))]
            # Find the one that the model cannot take, and serve the others.
            return [outcome for job in jobs for outcome in self._score([job])]
        return [self._outcome(score) for score in scores.tolist()]

    def _outcome(self, score: float) -> Outcome | ProblemError:
        if math.isfinite(score):
            return Outcome(score=score)
        logger.error("model %s gave a score that is not finite", self._model)
        return ProblemError(SCORE_NOT_FINITE, "the reward model's score is not finite for one of the summaries")

    def _die(self, error: BaseException) -> None:
        self._queue.fail(error, self._running)


def _request(job: Job) -> Request:
    assert job.sampling is not None, "a job without sampling is to be scored, not continued"
    return Request(prompt=job.ids, sampling=job.sampling, seed=job.seed)


def _speak(spoken: Sequence[tuple[Job, int]]) -> None:
    for job, token in spoken:
        if job.on_token is not None and not job.abandoned:
            job.on_token(token)
