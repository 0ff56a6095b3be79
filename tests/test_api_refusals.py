"""What /summarize and /score refuse, each time naming the field, and what they give up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.served_run import served_run
from tests.serving import Serving, refusal, serving_run

JSON = {"content-type": "application/json"}
MAX_POSTS, MAX_ITEMS, MAX_BEST_OF, MAX_SECONDS = 12, 20, 6, 60.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("refusals"))


@pytest.fixture(scope="module")
def serving(run_dir: Path) -> Iterator[Serving]:
    with serving_run(
        run_dir, max_posts=MAX_POSTS, max_items=MAX_ITEMS, max_best_of=MAX_BEST_OF, timeout_seconds=MAX_SECONDS
    ) as started:
        yield started


BAD_POSTS: list[tuple[str, str, str]] = [
    ('{"body": ""}', "body", "String should have at least 1 character"),
    ('""', "", "String should have at least 1 character"),
    ('{"body": " \\n "}', "", "the post is empty"),
    ('" \\n "', "", "the post is empty"),
    ('"TL;DR:"', "", "the post is empty"),
    ('{"body": "TL;DR:\\nTL;DR:"}', "", "the post is empty"),
    ('"SUBREDDIT: r/a\\nTITLE: b\\nPOST: \\nTL;DR:"', "", "the post is empty"),
    ('"SUBREDDIT: r/a\\nPOST: b"', "", "not a TL;DR prompt: line 2 does not begin with TITLE:"),
    ('{"body": "a\\ud800b"}', "body", "Input should be a valid string, unable to parse"),
    ('"a\\ud800b"', "", "Input should be a valid string, unable to parse"),
    ('{"title": "\\udc00", "body": "b"}', "title", "Input should be a valid string, unable to parse"),
    ('{"title": "t"}', "body", "Field required"),
    ('{"body": "b", "titel": "t"}', "titel", "unknown field"),
    ('{"body": 3}', "body", "Input should be a valid string"),
    ("3", "", "Input should be an object or Input should be a valid string"),
    ("null", "", "Input should be an object or Input should be a valid string"),
    (json.dumps("a" * 100_001), "", "String should have at most 100000 characters"),
    (json.dumps({"body": "b", "subreddit": "s" * 200}), "", "the header leaves no room for the post in 96 tokens"),
]


@pytest.mark.parametrize(("bad", "field", "message"), BAD_POSTS, ids=[bad[:40] for bad, _, _ in BAD_POSTS])
def test_a_bad_post_is_named(bad: str, field: str, message: str, serving: Serving) -> None:
    requests = {
        "/summarize": ("posts.1", f'{{"posts": ["good", {bad}]}}'),
        "/score": (
            "items.1.post",
            f'{{"items": [{{"post": "a", "summary": "b"}}, {{"post": {bad}, "summary": "b"}}]}}',
        ),
    }
    for path, (place, content) in requests.items():
        answer = serving.client.post(path, content=content, headers=JSON)
        [(named, told)] = refusal(answer).items()
        assert named == f"{place}.{field}".rstrip(".")
        assert told.startswith(message)


SECONDS_TOLD = "61 is more than 60"
BAD_OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"posts": ["a"] * (MAX_POSTS + 1)}, "posts", "13 posts are more than 12; send several requests"),
    ({"posts": []}, "posts", "List should have at least 1 item after validation, not 0"),
    ({"best_of": MAX_BEST_OF + 1}, "best_of", "7 is more than 6"),
    ({"best_of": 0}, "best_of", "Input should be greater than or equal to 1"),
    ({"best_of": True}, "best_of", "Input should be a valid integer"),
    ({"best_of": "2"}, "best_of", "Input should be a valid integer"),
    ({"max_new_tokens": 25}, "max_new_tokens", "25 is more than 24, for which the policy was trained"),
    ({"max_new_tokens": 10**30}, "max_new_tokens", f"{10**30} is more than 24, for which the policy was trained"),
    ({"max_new_tokens": 0}, "max_new_tokens", "Input should be greater than or equal to 1"),
    ({"temperature": -0.1}, "temperature", "Input should be greater than or equal to 0"),
    ({"temperature": 101}, "temperature", "Input should be less than or equal to 100"),
    ({"temperature": True}, "temperature", "Input should be a valid number"),
    ({"temperature": "1"}, "temperature", "Input should be a valid number"),
    ({"top_p": 0}, "top_p", "Input should be greater than 0"),
    ({"top_p": 1.1}, "top_p", "Input should be less than or equal to 1"),
    ({"seed": -1}, "seed", "Input should be greater than or equal to 0"),
    ({"seed": 2**53}, "seed", f"Input should be less than or equal to {2**53 - 1}"),
    ({"return_scores": 0}, "return_scores", "Input should be a valid boolean"),
    ({"truncation": "end"}, "truncation", "Input should be 'error' or 'body'"),
    ({"model": "reward"}, "model", "Input should be 'ppo' or 'sft'"),
    ({"timeout_seconds": 0}, "timeout_seconds", "Input should be greater than 0"),
    ({"timeout_seconds": 61}, "timeout_seconds", SECONDS_TOLD),
    ({"streem": True}, "streem", "unknown field"),
    ({"best_of": 2, "temperature": 0}, "temperature", "greedy candidates are all the same"),
]


@pytest.mark.parametrize(("options", "field", "message"), BAD_OPTIONS, ids=[str(bad)[:40] for bad, _, _ in BAD_OPTIONS])
def test_an_option_that_cannot_be_had_is_named(
    options: dict[str, Any], field: str, message: str, serving: Serving
) -> None:
    for query in ("", "?stream=true"):
        [(named, told)] = refusal(serving.client.post(f"/summarize{query}", json={"posts": ["a"]} | options)).items()
        assert named == field
        assert told.startswith(message)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_what_is_no_number_is_refused(value: str, serving: Serving) -> None:
    for field in ("temperature", "top_p", "timeout_seconds"):
        content = f'{{"posts": ["a"], "{field}": {value}}}'
        answer = serving.client.post("/summarize", content=content, headers=JSON)
        assert refusal(answer) == {field: "Input should be a finite number"}


def test_a_model_that_is_not_served_is_refused_by_name(run_dir: Path) -> None:
    with serving_run(run_dir, models="sft") as serving:
        answer = serving.client.post("/summarize", json={"posts": ["a"]})
        assert refusal(answer) == {"model": "ppo is not served here; choose from sft"}
        answer = serving.client.post("/summarize", json={"posts": ["a"], "model": "sft"})
        assert answer.json()["model"] == "sft"


@pytest.mark.parametrize("path", ["/summarize", "/summarize?stream=true", "/score"])
def test_a_request_is_given_up_after_its_time(path: str, serving: Serving) -> None:
    body = {"posts": ["a"]} if "summarize" in path else {"items": [{"post": "a", "summary": "b"}]}
    answer = serving.client.post(path, json=body | {"timeout_seconds": 1e-6})
    assert refusal(answer, 504, "deadline") == {}
    assert answer.json()["detail"] == "the request was not done within 1e-06 seconds"


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ('{"items": []}', "items", "List should have at least 1 item"),
        ('{"items": [{"post": "a"}]}', "items.0.summary", "Field required"),
        ('{"items": [{"post": "a", "summary": null}]}', "items.0.summary", "Input should be a valid string"),
        (
            '{"items": [{"post": "a", "summary": "\\ud800"}]}',
            "items.0.summary",
            "Input should be a valid string, unable",
        ),
        (
            '{"items": [{"post": "a", "summary": "b", "reference": "\\ud800"}]}',
            "items.0.reference",
            "Input should be a",
        ),
        ('{"items": [{"post": "a", "summary": "b", "score": 1}]}', "items.0.score", "unknown field"),
        ('{"items": [3]}', "items.0", "Input should be an object"),
        ('{"items": [{"token_ids": []}]}', "items.0.token_ids", "List should have at least 1 item"),
        ('{"items": [{"token_ids": [1, "2"]}]}', "items.0.token_ids.1", "Input should be a valid integer"),
        ('{"items": [{"token_ids": [true]}]}', "items.0.token_ids.0", "Input should be a valid integer"),
        ('{"items": [{"token_ids": [-1]}]}', "items.0.token_ids.0", "Input should be greater than or equal to 0"),
        ('{"items": [{"token_ids": [1], "post": "a"}]}', "items.0.post", "unknown field"),
        (
            '{"items": [{"token_ids": [1]}, {"token_ids": [259, 260]}]}',
            "items.1.token_ids",
            "token id 260 is outside the reward model's vocabulary of 260; use its own tokenizer",
        ),
        (
            json.dumps({"items": [{"token_ids": [1] * 129}]}),
            "items.0.token_ids",
            "129 tokens are more than the 128 that the reward model reads; cut them",
        ),
        (
            json.dumps({"items": [{"post": "a", "summary": "b"}] * (MAX_ITEMS + 1)}),
            "items",
            "21 items are more than 20; send several requests",
        ),
        ('{"items": [{"post": "a", "summary": "b"}], "timeout_seconds": 61}', "timeout_seconds", SECONDS_TOLD),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_item_that_cannot_be_scored_is_named(body: str, field: str, message: str, serving: Serving) -> None:
    answer = serving.client.post("/score", content=body, headers=JSON)
    [(named, told)] = refusal(answer).items()
    assert named == field
    assert told.startswith(message)
