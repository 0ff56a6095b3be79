"""Whose turn it is, what is batched together, and when no more is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from app.fair_queue import FairQueue, Job
from app.problems import INVALID_REQUEST, QUEUE_FULL, ProblemError


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Futures belong to a loop; so a test that makes jobs runs in one."""

    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def job(call: str, length: int, cost: int | None = None) -> Job:
    outcome = asyncio.get_running_loop().create_future()
    return Job(call=call, ids=[0] * length, cost=length if cost is None else cost, outcome=outcome)


def names(jobs: list[Job]) -> list[str]:
    return [str(one.call) for one in jobs]


@in_loop
async def test_calls_take_turns() -> None:
    queue = FairQueue(max_tokens=1000)
    queue.put([job("long", 5) for _ in range(4)])
    queue.put([job("short", 5)])
    queue.put([job("other", 5) for _ in range(2)])
    order = [names(queue.take(count=1, tokens=100))[0] for _ in range(7)]
    assert order == ["long", "short", "other", "long", "other", "long", "long"]
    assert queue.take(count=1, tokens=100) == []
    assert (len(queue), queue.tokens) == (0, 0)


@in_loop
async def test_a_call_that_comes_later_does_not_pass_one_that_waits() -> None:
    queue = FairQueue(max_tokens=1000)
    queue.put([job("a", 5), job("a", 5), job("a", 5)])
    queue.put([job("b", 5), job("b", 5)])
    assert names(queue.take(count=1, tokens=100)) == ["a"]
    queue.put([job("c", 5)])
    assert [names(queue.take(count=1, tokens=100))[0] for _ in range(3)] == ["b", "a", "c"]


@in_loop
async def test_a_batch_is_of_like_length_around_the_one_whose_turn_it_is() -> None:
    queue = FairQueue(max_tokens=10_000)
    queue.put([job("first", 50)])
    queue.put([job("others", length) for length in (400, 48, 55, 10, 52)])
    batch = queue.take(count=4, tokens=250)
    # 48, 52 and 55 are nearest; four of 55 with padding are 220 tokens.
    assert sorted(len(one.ids) for one in batch) == [48, 50, 52, 55]
    assert sorted(len(one.ids) for one in queue.take(count=4, tokens=250)) == [400]
    assert sorted(len(one.ids) for one in queue.take(count=4, tokens=250)) == [10]


@in_loop
async def test_padding_counts() -> None:
    queue = FairQueue(max_tokens=10_000)
    queue.put([job("a", 10) for _ in range(3)] + [job("a", 30)])
    assert [len(one.ids) for one in queue.take(count=9, tokens=119)] == [10, 10, 10]  # 4 × 30 would be 120


@in_loop
async def test_without_padding_jobs_go_as_their_turns_come() -> None:
    queue = FairQueue(max_tokens=10_000)
    queue.put([job("a", 50), job("a", 10), job("a", 5)])
    queue.put([job("b", 30), job("b", 50)])
    batch = queue.take(count=9, tokens=140, padded=False)
    assert [(one.call, len(one.ids)) for one in batch] == [("a", 50), ("b", 30), ("a", 10), ("b", 50)]  # 140 tokens
    assert [len(one.ids) for one in queue.take(count=9, tokens=1, padded=False)] == [5]
    queue.put([job("a", 1) for _ in range(3)])
    assert len(queue.take(count=2, tokens=100, padded=False)) == 2


@in_loop
async def test_the_first_is_taken_however_long_it_is() -> None:
    queue = FairQueue(max_tokens=10_000)
    queue.put([job("a", 500), job("a", 500)])
    assert len(queue.take(count=9, tokens=100)) == 1


@in_loop
async def test_candidates_of_one_prompt_count_once() -> None:
    queue = FairQueue(max_tokens=10_000)
    one = job("a", 60)
    more = [Job(call="a", ids=one.ids, cost=60, outcome=one.outcome) for _ in range(5)]
    queue.put([one, *more, job("a", 60)])
    assert len(queue.take(count=9, tokens=100)) == 6


@in_loop
async def test_a_full_queue_says_when_to_come_back() -> None:
    queue = FairQueue(max_tokens=100)
    queue.put([job("a", 10, cost=90)])
    with pytest.raises(ProblemError, match="90 tokens are waiting and 20 more would pass the limit of 100") as caught:
        queue.put([job("b", 10, cost=20)], tokens_per_second=30.0)
    assert caught.value.kind is QUEUE_FULL
    assert caught.value.retry_after == 3.0  # 90 tokens at 30 a second
    assert names(queue.take(count=9, tokens=1000)) == ["a"]
    queue.put([job("b", 10, cost=20)])
    queue.put([job("c", 10, cost=95)], bounded=False)
    assert queue.tokens == 115


@in_loop
async def test_all_jobs_of_a_call_are_taken_in_or_none() -> None:
    queue = FairQueue(max_tokens=100)
    queue.put([job("a", 10, cost=50)])
    with pytest.raises(ProblemError):
        queue.put([job("b", 10, cost=20) for _ in range(3)])
    assert (len(queue), queue.tokens) == (1, 50)


@in_loop
async def test_a_call_that_never_fits_is_told_so() -> None:
    with pytest.raises(ProblemError, match="101 tokens of work and 100 fit") as caught:
        FairQueue(max_tokens=100).put([job("a", 10, cost=101)])
    assert caught.value.kind is INVALID_REQUEST


@in_loop
async def test_unwanted_jobs_leave() -> None:
    queue = FairQueue(max_tokens=100)
    wanted, abandoned = job("a", 10), job("a", 20)
    queue.put([wanted, abandoned])
    abandoned.outcome.cancel()
    assert queue.take_if(lambda one: one.abandoned) == [abandoned]
    assert (len(queue), queue.tokens) == (1, 10)
