"""/summarize as server-sent events: the same summaries, in whole characters, as they are written."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from app.incremental_text import HALF_CHARACTER, IncrementalText
from rlhf.prompt import decode_response
from tests.served_run import STEPS, served_run
from tests.serving import Serving, fields, post_of, refusal, serving_run
from tests.tiny_run import byte_tokenizer

POSTS = [fields(post_of(number)) for number in range(5)]
Event = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving_run(served_run(tmp_path_factory.mktemp("stream"))) as started:
        yield started


@pytest.fixture
def scorer(serving: Serving) -> Any:
    """The service's own, for a test to break."""
    with serving.service.held() as served:
        return served.reward.scorer


def stream(serving: Serving, **body: Any) -> list[Event]:
    return events_of(serving.client.post("/summarize?stream=true", json={"posts": POSTS, **body}))


def events_of(answer: httpx.Response) -> list[Event]:
    """The events; a comment, which begins with a colon, is none."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\n")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        event, data = block.split("\n")
        assert event.startswith("event: ")
        assert data.startswith("data: ")
        events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def texts(events: list[Event]) -> dict[tuple[int, int], str]:
    """What was written, by post and candidate."""
    written: dict[tuple[int, int], str] = {}
    for name, data in events:
        if name == "token":
            assert set(data) == {"index", "candidate", "text"}
            assert data["text"]
            place = data["index"], data["candidate"]
            written[place] = written.get(place, "") + data["text"]
    return written


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_tells_what_an_answer_tells(seed: int, serving: Serving) -> None:
    options = {"posts": POSTS, "seed": seed, "temperature": 1.5}
    answer = serving.client.post("/summarize", json=options).json()
    events = stream(serving, **options)
    results = {data["index"]: data for name, data in events if name == "result"}
    for expected in answer["results"]:
        told = results[expected["index"]]
        assert told.pop("score") == pytest.approx(expected.pop("score"), abs=1e-4)
        assert told == expected
    assert texts(events) == {(index, 0): told["summary"] for index, told in results.items() if told["summary"]}


def test_tokens_come_first_then_the_result_and_done_at_the_end(serving: Serving) -> None:
    events = stream(serving, seed=1)
    names = [name for name, _ in events]
    assert names[-1] == "done"
    assert (names.count("done"), names.count("result")) == (1, len(POSTS))
    assert set(names) == {"token", "result", "done"}
    done_posts = set()
    for name, data in events[:-1]:
        assert data["index"] not in done_posts
        if name == "result":
            done_posts.add(data["index"])
    assert names.index("result") > 10  # written token by token, not told at the end


def test_done_says_how_it_was_made(serving: Serving) -> None:
    answer = serving.client.post("/summarize?stream=true", json={"posts": ["a"], "seed": 9, "model": "sft"})
    name, data = events_of(answer)[-1]
    assert name == "done"
    expected = {"model": "sft", "run": "served", "step": STEPS["sft"], "seed": 9}
    assert data == {"id": answer.headers["x-request-id"], **expected}


def test_every_candidate_is_told(serving: Serving) -> None:
    events = stream(serving, best_of=3, seed=2, temperature=1.5, return_candidates=True)
    written = texts(events)
    for name, data in events:
        if name == "result":
            told = sorted(written.get((data["index"], candidate), "") for candidate in range(3))
            assert told == sorted(candidate["summary"] for candidate in data["candidates"])
            assert data["summary"] == data["candidates"][0]["summary"]


def test_scores_are_left_out_when_not_wanted(serving: Serving) -> None:
    scores = [data["score"] for name, data in stream(serving, return_scores=False) if name == "result"]
    assert scores == [None] * len(POSTS)


@pytest.mark.parametrize(
    ("query", "accept", "streams"),
    [
        ("", "text/event-stream", True),
        ("", "application/json;q=0.5, text/event-stream", True),
        ("?stream=true", "*/*", True),
        ("?stream=1", "application/json", True),
        ("?stream=false", "application/json", False),
        ("", "*/*", False),
    ],
)
def test_a_stream_is_asked_for_by_header_or_query(query: str, accept: str, streams: bool, serving: Serving) -> None:
    answer = serving.client.post(f"/summarize{query}", json={"posts": ["a"]}, headers={"accept": accept})
    if streams:
        assert [name for name, _ in events_of(answer)][-1] == "done"
        assert answer.headers["cache-control"] == "no-store"
        assert "content-length" not in answer.headers
    else:
        assert answer.headers["content-type"] == "application/json"


def test_what_is_wrong_before_the_first_event_is_an_ordinary_answer(serving: Serving) -> None:
    before = refused(serving, "invalid-request")
    for body, field in (
        ({"posts": ["TL;DR:"]}, "posts.0"),
        ({"posts": ["a"], "max_new_tokens": 999}, "max_new_tokens"),
    ):
        assert set(refusal(serving.client.post("/summarize?stream=true", json=body))) == {field}
    assert refused(serving, "invalid-request") == before + 2


def test_a_failure_on_the_way_is_the_last_event(serving: Serving, scorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = refused(serving, "score-not-finite")
    monkeypatch.setattr(scorer, "score", lambda sequences, **how: torch.full((len(sequences),), torch.nan))
    answer = serving.client.post("/summarize?stream=true", json={"posts": ["a"]})
    *others, (name, problem) = events_of(answer)
    assert {name for name, _ in others} == {"token"}
    assert (name, problem["type"], problem["status"]) == ("error", "/problems/score-not-finite", 500)
    assert (problem["instance"], problem["request_id"]) == ("/summarize", answer.headers["x-request-id"])
    assert refused(serving, "score-not-finite") == before + 1


def test_time_that_runs_out_on_the_way_is_the_last_event(
    serving: Serving, scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, may_score = scorer.score, threading.Event()

    def held_up(sequences: Any, **how: Any) -> torch.Tensor:
        may_score.wait()
        return score(sequences, **how)

    monkeypatch.setattr(scorer, "score", held_up)
    try:
        *_, (name, problem) = stream(serving, timeout_seconds=1.5)
    finally:
        may_score.set()
    assert (name, problem["type"], problem["status"]) == ("error", "/problems/deadline", 504)
    assert problem["detail"] == "the request was not done within 1.5 seconds"
    monkeypatch.undo()
    assert stream(serving)[-1][0] == "done"


def refused(serving: Serving, reason: str) -> float:
    return serving.service.metrics.registry.get_sample_value("rlhf_requests_refused_total", {"reason": reason}) or 0.0


TEXTS = [
    "lost a cat",
    "\N{PILE OF POO} \N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} caf\u00e9 \u65e5\u672c",
    "a \N{REPLACEMENT CHARACTER} of its own, and one at the end \N{REPLACEMENT CHARACTER}",
    "two\r\nlines\n\n and\r\x0b a gap\u00a0 \n",
    " \n ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_in_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    growing = IncrementalText(tokenizer)
    pieces = [growing.add(token) for token in [*ids, tokenizer.eos_token_id]]
    if HALF_CHARACTER not in text:
        assert not any(HALF_CHARACTER in piece for piece in pieces)
    assert "".join(pieces) + growing.rest() == decode_response(tokenizer, ids)


def test_a_character_is_said_with_its_last_byte() -> None:
    tokenizer = byte_tokenizer()
    growing = IncrementalText(tokenizer)
    pieces = [growing.add(token) for token in tokenizer("a\N{PILE OF POO}b")["input_ids"]]
    assert pieces == ["a", "", "", "", "\N{PILE OF POO}", "b"]


def test_half_a_character_stays_one_where_no_other_half_comes() -> None:
    tokenizer = byte_tokenizer()
    first, *_ = tokenizer("\N{PILE OF POO}")["input_ids"]
    [letter] = tokenizer("b")["input_ids"]
    growing = IncrementalText(tokenizer)
    assert [growing.add(first), growing.add(letter), growing.add(first)] == ["", f"{HALF_CHARACTER}b", ""]
    assert (growing.rest(), growing.rest()) == (HALF_CHARACTER, "")


def test_any_bytes_add_up_to_the_text() -> None:
    tokenizer, chance = byte_tokenizer(), random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(258) for _ in range(chance.randrange(12))]
        growing = IncrementalText(tokenizer)
        pieces = [growing.add(token) for token in ids]
        assert "".join(pieces) + growing.rest() == decode_response(tokenizer, ids)
