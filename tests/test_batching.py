"""The queues before the models: sharing, leaving, deadlines, and what happens when a model fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
import torch
from torch import Tensor

from app.batching import GenerationQueue, QueueLimits, ScoringQueue
from app.fair_queue import Job
from app.metrics import Metrics
from app.problems import ENGINE_DEAD, INTERNAL, INVALID_REQUEST, SCORE_NOT_FINITE, WAITED_TOO_LONG, ProblemError
from rlhf.sampling import Sampling
from rlhf.slots import NextToken, Request

LIMITS = QueueLimits(tokens=10**9, seconds=60.0, batch_tokens=1000)
BAD, DEADLY, NOT_FINITE = 666, 667, 668


class FakeBatch:
    """Writes 0, 1, 2, … to every row; `may_step` holds the steps back while it is not set."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.rows: dict[int, list[int]] = {}
        self.added: list[list[list[int]]] = []
        self.most = 0
        self.may_step = threading.Event()
        self.may_step.set()
        self._wanted: dict[int, Request] = {}

    @property
    def room(self) -> int:
        return self.slots - len(self.rows)

    def add(self, requests: Mapping[int, Request]) -> list[NextToken]:
        if any(BAD in request.prompt for request in requests.values()):
            raise ValueError("token id 666 is bad")
        if any(DEADLY in request.prompt for request in requests.values()):
            raise RuntimeError("the device is gone")
        self.added.append([list(request.prompt) for request in requests.values()])
        self.rows |= {key: [] for key in requests}
        self._wanted |= requests
        self.most = max(self.most, len(self.rows))
        return []

    def step(self) -> list[NextToken]:
        self.may_step.wait()
        news = []
        for key, written in list(self.rows.items()):
            token = len(written)
            written.append(token)
            finish = "length" if len(written) == self._wanted[key].sampling.max_new_tokens else None
            if NOT_FINITE in self._wanted[key].prompt:
                finish = "failed"
            news.append(NextToken(key, token, finish))
            if finish:
                del self.rows[key]
        return news

    def abort(self, keys: Collection[int]) -> None:
        for key in keys:
            self.rows.pop(key, None)


class FakeScorer:
    """Scores a sequence by its sum; `may_score` holds it back while it is not set."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.may_score = threading.Event()
        self.may_score.set()

    def score(self, sequences: Sequence[Sequence[int]], *, allow_nonfinite: bool = False) -> Tensor:
        self.may_score.wait()
        self.batches.append(len(sequences))
        if any(DEADLY in ids for ids in sequences):
            raise RuntimeError("the device is gone")
        if any(BAD in ids for ids in sequences):
            raise ValueError("token id 666 is bad")
        return torch.tensor([float("nan") if NOT_FINITE in ids else float(sum(ids)) for ids in sequences])


def job(ids: Sequence[int], tokens: int = 3, call: object = None) -> Job:
    return Job(
        call=call or object(),
        ids=ids,
        cost=len(ids) + tokens,
        outcome=asyncio.get_running_loop().create_future(),
        sampling=Sampling(max_new_tokens=tokens),
    )


@asynccontextmanager
async def generating(batch: FakeBatch, limits: QueueLimits = LIMITS) -> AsyncIterator[GenerationQueue]:
    queue = GenerationQueue(batch, model="ppo", limits=limits, metrics=Metrics())
    try:
        yield queue
    finally:
        batch.may_step.set()
        await asyncio.to_thread(queue.close)


@asynccontextmanager
async def scoring(scorer: FakeScorer, limits: QueueLimits = LIMITS) -> AsyncIterator[ScoringQueue]:
    queue = ScoringQueue(scorer, model="reward", limits=limits, metrics=Metrics())  # type: ignore[arg-type]
    try:
        yield queue
    finally:
        scorer.may_score.set()
        await asyncio.to_thread(queue.close)


async def until(condition: object) -> None:
    """Wait for what another thread will bring about."""
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_jobs_of_many_callers_run_together_and_each_gets_its_own() -> None:
    async def run() -> None:
        batch = FakeBatch(slots=8)
        async with generating(batch) as queue:
            jobs = [job([number], tokens=number + 1) for number in range(20)]
            for one in jobs:
                queue.submit([one])
            outcomes = await asyncio.gather(*(one.outcome for one in jobs))
        assert [outcome.tokens for outcome in outcomes] == [tuple(range(number + 1)) for number in range(20)]
        assert {outcome.finish for outcome in outcomes} == {"length"}
        assert batch.most == 8

    asyncio.run(run())


def test_a_late_caller_does_not_wait_for_a_long_one() -> None:
    async def run() -> None:
        async with generating(FakeBatch(slots=2)) as queue:
            long, short = job([1], tokens=100_000), job([2], tokens=2)
            queue.submit([long])
            await until(lambda: long.written)
            queue.submit([short])
            assert (await short.outcome).tokens == (0, 1)
            assert not long.outcome.done()
            long.outcome.cancel()

    asyncio.run(run())


def test_tokens_are_heard_as_they_come() -> None:
    async def run() -> None:
        async with generating(FakeBatch(slots=2)) as queue:
            heard: list[int] = []
            one = job([1], tokens=4)
            one.on_token = heard.append
            queue.submit([one])
            await one.outcome
            assert heard == [0, 1, 2, 3]

    asyncio.run(run())


def test_a_caller_who_leaves_frees_the_place() -> None:
    async def run() -> None:
        batch = FakeBatch(slots=1)
        async with generating(batch) as queue:
            leaving, waiting, staying = job([1], tokens=100_000), job([2]), job([3])
            for one in (leaving, waiting, staying):
                queue.submit([one])
            await until(lambda: leaving.written)
            waiting.outcome.cancel()
            leaving.outcome.cancel()
            assert (await staying.outcome).tokens == (0, 1, 2)
        assert [[3]] in batch.added
        assert [[2]] not in batch.added

    asyncio.run(run())


def test_what_was_waiting_is_not_counted_when_its_callers_have_left() -> None:
    async def run() -> None:
        batch, metrics = FakeBatch(slots=1), Metrics()
        queue = GenerationQueue(batch, model="ppo", limits=LIMITS, metrics=metrics)

        def waiting() -> float | None:
            return metrics.registry.get_sample_value("rlhf_num_requests_waiting", {"model": "ppo"})

        running, leaving = job([1], tokens=100_000), job([2])
        queue.submit([running])
        await until(lambda: running.written)
        queue.submit([leaving])
        await until(lambda: waiting() == 1)
        leaving.outcome.cancel()
        await until(lambda: waiting() == 0)
        assert not running.outcome.done()
        running.outcome.cancel()
        await asyncio.to_thread(queue.close)

    asyncio.run(run())


def test_the_thread_does_not_sleep_while_work_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.worker.NAP_SECONDS", 3600.0)  # only a caller who comes would wake it

    async def run() -> None:
        async with generating(FakeBatch(slots=1)) as queue:
            jobs = [job([number], tokens=2) for number in range(20)]
            queue.submit(jobs)
            async with asyncio.timeout(20):
                await asyncio.gather(*(one.outcome for one in jobs))

    asyncio.run(run())


def test_what_waits_too_long_is_told_so() -> None:
    async def run() -> None:
        batch = FakeBatch(slots=1)
        limits = QueueLimits(tokens=10**9, seconds=0.2, batch_tokens=1000)
        async with generating(batch, limits) as queue:
            running, waiting = job([1], tokens=100_000), job([2])
            queue.submit([running])
            await until(lambda: running.written)
            queue.submit([waiting])
            with pytest.raises(ProblemError, match=r"within 0\.2 seconds") as caught:
                await waiting.outcome
            assert caught.value.kind is WAITED_TOO_LONG
            running.outcome.cancel()

    asyncio.run(run())


def test_one_bad_job_does_not_hurt_those_beside_it() -> None:
    async def run() -> None:
        batch = FakeBatch(slots=8)
        batch.may_step.clear()
        async with generating(batch) as queue:
            jobs = [job([1]), job([BAD]), job([2]), job([NOT_FINITE])]
            queue.submit(jobs)
            batch.may_step.set()
            outcomes = await asyncio.gather(*(one.outcome for one in jobs), return_exceptions=True)
        good, bad, other, failed = outcomes
        assert good.tokens == other.tokens == (0, 1, 2)
        assert bad.kind is INVALID_REQUEST
        assert failed.kind is INTERNAL

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_dies_everybody_hears_of_it() -> None:
    async def run() -> None:
        batch = FakeBatch(slots=2)
        async with generating(batch) as queue:
            running = [job([number], tokens=100_000) for number in (1,)]
            queue.submit(running)
            await until(lambda: running[0].written)
            deadly, behind = job([DEADLY]), job([4])
            queue.submit([deadly])
            queue.submit([behind])
            outcomes = await asyncio.gather(
                *(one.outcome for one in (*running, deadly, behind)), return_exceptions=True
            )
            assert [outcome.kind for outcome in outcomes] == [ENGINE_DEAD] * 3
            assert "RuntimeError" in (queue.worker.trouble(stall_seconds=60) or "")
            with pytest.raises(ProblemError, match="has died"):
                queue.submit([job([5])])

    asyncio.run(run())


def test_a_step_that_hangs_is_noticed() -> None:
    async def run() -> None:
        batch = FakeBatch(slots=2)
        batch.may_step.clear()
        async with generating(batch) as queue:
            assert queue.worker.trouble(stall_seconds=0.05) is None
            one = job([1])
            queue.submit([one])
            await until(lambda: queue.worker.trouble(stall_seconds=0.05))
            batch.may_step.set()
            await one.outcome
            await until(lambda: queue.worker.trouble(stall_seconds=0.05) is None)

    asyncio.run(run())


def test_scores_of_many_callers_share_batches() -> None:
    async def run() -> None:
        scorer = FakeScorer()
        scorer.may_score.clear()
        async with scoring(scorer) as queue:
            first = job([7])
            queue.submit([first])
            await until(lambda: queue.worker.trouble(stall_seconds=0))
            jobs = [job([number, 1]) for number in range(50)]
            for one in jobs:
                queue.submit([one])
            scorer.may_score.set()
            outcomes = await asyncio.gather(first.outcome, *(one.outcome for one in jobs))
        assert [outcome.score for outcome in outcomes] == [7.0] + [number + 1.0 for number in range(50)]
        assert scorer.batches == [1, 50]

    asyncio.run(run())


def test_a_sequence_that_cannot_be_scored_fails_alone() -> None:
    async def run() -> None:
        async with scoring(FakeScorer()) as queue:
            jobs = [job([1]), job([NOT_FINITE]), job([BAD]), job([2])]
            queue.submit(jobs)
            good, not_finite, bad, other = await asyncio.gather(*(one.outcome for one in jobs), return_exceptions=True)
        assert (good.score, other.score) == (1.0, 2.0)
        assert not_finite.kind is SCORE_NOT_FINITE
        assert bad.kind is INVALID_REQUEST

    asyncio.run(run())


def test_a_scorer_that_dies_takes_nobody_with_it_silently() -> None:
    async def run() -> None:
        async with scoring(FakeScorer()) as queue:
            one = job([DEADLY])
            queue.submit([one])
            with pytest.raises(ProblemError) as caught:
                await one.outcome
            assert caught.value.kind is ENGINE_DEAD
            assert queue.worker.trouble(stall_seconds=60)

    asyncio.run(run())
