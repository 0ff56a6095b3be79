"""Each answer is independent of its neighbours: alone, in one call with others, or among other callers."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rlhf.prompt import Post
from rlhf.sampling import Sampling
from tests.alone import Alone
from tests.served_run import MAX_RESPONSE_TOKENS, served_run
from tests.serving import Serving, fields, serving_run

COUNT = 40
_CHANCE = random.Random(0)
POSTS = [
    Post("pets", "", "".join(_CHANCE.choices(string.ascii_letters + " .", k=_CHANCE.randrange(3, 50))))
    for _ in range(COUNT)
]
"""Of all lengths; a random model has something different to say to nearly each."""
SENT = [fields(post) for post in POSTS]
ITEMS = [{"post": post, "summary": f"lost {'it ' * (number % 7)}{number}"} for number, post in enumerate(SENT)]
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Few slots and small batches, so that rows of many callers join and leave while others are being written."""
    run_dir = served_run(tmp_path_factory.mktemp("independence"))
    with serving_run(run_dir, slots=7, max_best_of=4, prefill_tokens=300, score_batch_tokens=500) as started:
        yield started


@pytest.fixture(scope="module")
def alone(serving: Serving) -> Alone:
    return Alone(serving.service.settings.run_dir)


def ask(serving: Serving, path: str, body: dict[str, Any]) -> Results:
    answer = serving.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


async def ask_all(url: str, calls: list[tuple[str, dict[str, Any]]]) -> list[Results]:
    """All calls at once, each on a connection of its own."""
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for path, body in calls))
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json()["results"] for answer in answers]


def assert_same(found: Results, expected: Results, *, told: tuple[str, ...]) -> None:
    """What is told is the same, and the scores are so to 1e-4."""
    for name in told:
        assert [one[name] for one in found] == [one[name] for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-4)


WRITTEN = ("summary", "completion_tokens", "finish_reason", "prompt_tokens", "cut_tokens")
SCORED = ("prompt_tokens", "summary_tokens", "cut_tokens")


def test_summaries_do_not_depend_on_their_neighbours(serving: Serving, alone: Alone) -> None:
    one_by_one = [ask(serving, "/summarize", {"posts": [post]})[0] for post in SENT]
    written = [alone.write(post) for post in POSTS]
    assert [one["summary"] for one in one_by_one] == [one.summary for one in written]
    assert [one["score"] for one in one_by_one] == pytest.approx([one.score for one in written], abs=1e-4)
    assert len({one["summary"] for one in one_by_one}) > 3 / 4 * COUNT

    together = ask(serving, "/summarize", {"posts": SENT})
    assert_same(together, one_by_one, told=WRITTEN)

    greedy = [("/summarize", {"posts": [post]}) for post in SENT]
    sampled = [("/summarize", {"posts": [post], "temperature": 1.5, "best_of": 2}) for post in SENT[::2]]
    others = [("/score", {"items": ITEMS[:5]}), ("/summarize", {"posts": SENT[:9], "model": "sft"})] * 4
    mixed = asyncio.run(ask_all(serving.url, [*sampled, *greedy, *others]))
    concurrent = [result for [result] in mixed[len(sampled) : len(sampled) + COUNT]]
    assert_same(concurrent, one_by_one, told=WRITTEN)


def test_scores_do_not_depend_on_their_neighbours(serving: Serving) -> None:
    one_by_one = [ask(serving, "/score", {"items": [item]})[0] for item in ITEMS]
    together = ask(serving, "/score", {"items": ITEMS})
    assert_same(together, one_by_one, told=SCORED)
    calls = [("/score", {"items": [item]}) for item in ITEMS] + [("/summarize", {"posts": SENT[:9]})] * 4
    concurrent = [result for [result] in asyncio.run(ask_all(serving.url, calls))[:COUNT]]
    assert_same(concurrent, one_by_one, told=SCORED)


def test_what_a_seed_draws_does_not_depend_on_its_neighbours(serving: Serving, alone: Alone) -> None:
    """Nor on the post's place in a call: one stream of random numbers a candidate, not a call."""
    sampling = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS, temperature=1.5)
    expected = [alone.write(post, sampling, seed=4).summary for post in POSTS]
    options = {"temperature": 1.5, "seed": 4}
    together = ask(serving, "/summarize", {"posts": SENT, **options})
    assert [one["summary"] for one in together] == expected
    calls = [("/summarize", {"posts": [post], **options}) for post in SENT]
    concurrent = asyncio.run(ask_all(serving.url, [*calls, ("/summarize", {"posts": SENT})]))
    assert [result["summary"] for [result] in concurrent[:COUNT]] == expected
