"""/summarize over HTTP: what is asked for is what is answered, to the token and to 1e-4 of a score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.prompt import Post, render_prompt
from rlhf.sampling import Sampling
from tests.alone import Alone, Written
from tests.served_run import MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, STEPS, served_run
from tests.serving import Serving, fields, post_of, refusal, serving_run

POST = post_of(0)
LONG_BODY = "I lost my cat today. " * 20
BARE_TOKENS = len("SUBREDDIT: r/\nTITLE: \nPOST: \nTL;DR:")
"""Of a post without a body: the tokenizer makes a token of every byte."""
LONG_TOKENS = BARE_TOKENS + len(LONG_BODY.strip())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def alone(run_dir: Path) -> Alone:
    return Alone(run_dir)


@pytest.fixture(scope="module")
def serving(run_dir: Path) -> Iterator[Serving]:
    with serving_run(run_dir) as started:
        yield started


def summarize(serving: Serving, posts: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    answer = serving.client.post("/summarize", json={"posts": posts or [fields(POST)], **options})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == answer.headers["x-request-id"]
    return answer.json()


def assert_is(result: dict[str, Any], expected: Written) -> None:
    assert (result["summary"], result["finish_reason"]) == (expected.summary, expected.finish)
    assert result["completion_tokens"] == len(expected.tokens)
    assert result["score"] == pytest.approx(expected.score, abs=1e-4)


def test_every_post_is_answered_in_its_place(serving: Serving, alone: Alone) -> None:
    posts = [post_of(number) for number in range(12)]
    answer = summarize(serving, [fields(post) for post in posts])
    assert (answer["model"], answer["run"], answer["step"]) == ("ppo", "served", STEPS["ppo"])
    assert [result["index"] for result in answer["results"]] == list(range(12))
    for post, result in zip(posts, answer["results"], strict=True):
        assert_is(result, alone.write(post))
        assert result["prompt_tokens"] == len(render_prompt(post).encode())  # a byte is a token here
        assert (result["cut_tokens"], result["candidates"]) == (0, None)


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.5, "max_new_tokens": 7},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 0.0, "max_new_tokens": 1},
]


@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1])
@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_a_seed_and_its_options_name_one_summary(
    options: dict[str, Any], seed: int, serving: Serving, alone: Alone
) -> None:
    sampling = Sampling(**{"max_new_tokens": MAX_RESPONSE_TOKENS} | options)
    answer = summarize(serving, seed=seed, **options)
    assert answer["seed"] == seed
    assert_is(answer["results"][0], alone.write(POST, sampling, seed=seed))


def test_the_options_matter(serving: Serving) -> None:
    asked = [*SAMPLINGS, {}, {"temperature": 1.0, "model": "sft"}]
    told = {summarize(serving, seed=7, **options)["results"][0]["summary"] for options in asked}
    assert len(told) == len(asked)


def test_a_seed_that_was_drawn_is_told_and_gives_the_same_again(serving: Serving) -> None:
    first, second = (summarize(serving, temperature=1) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["results"] != second["results"]
    again = summarize(serving, temperature=1, seed=first["seed"])
    assert again["results"][0]["summary"] == first["results"][0]["summary"]


def test_without_a_temperature_it_is_greedy(serving: Serving) -> None:
    answers = [summarize(serving, seed=seed, **more) for seed in (1, 2) for more in ({}, {"temperature": 0})]
    assert len({answer["results"][0]["summary"] for answer in answers}) == 1


@pytest.mark.parametrize(
    "options", [{"temperature": 5e-324}, {"temperature": 1e-30}, {"temperature": 3, "top_p": 5e-324}]
)
def test_extreme_options_are_greedy(options: dict[str, float], serving: Serving, alone: Alone) -> None:
    [result] = summarize(serving, seed=1, **options)["results"]
    assert_is(result, alone.write(POST))


def test_null_is_the_same_as_absent(serving: Serving) -> None:
    absent = {"max_new_tokens": None, "temperature": None, "timeout_seconds": None, "seed": None}
    assert summarize(serving, **absent)["results"] == summarize(serving)["results"]


@pytest.mark.parametrize("model", ["ppo", "sft"])
def test_the_model_that_is_named_writes(model: str, serving: Serving, alone: Alone) -> None:
    answer = summarize(serving, model=model)
    assert (answer["model"], answer["step"]) == (model, STEPS[model])
    assert_is(answer["results"][0], alone.write(POST, model=model))


def test_best_of_picks_the_candidate_that_scores_highest(serving: Serving, alone: Alone) -> None:
    posts = [post_of(0), post_of(1)]
    answer = summarize(
        serving, [fields(post) for post in posts], best_of=6, seed=3, temperature=1.5, return_candidates=True
    )
    sampling = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS, temperature=1.5)
    for post, result in zip(posts, answer["results"], strict=True):
        written = [alone.write(post, sampling, seed=3, number=number) for number in range(6)]
        ranked = sorted(written, key=lambda one: -one.score)
        for candidate, expected in zip(result["candidates"], ranked, strict=True):
            assert_is(candidate, expected)
        assert_is(result, ranked[0])
    finishes = {candidate["finish_reason"] for result in answer["results"] for candidate in result["candidates"]}
    assert finishes == {"stop", "length"}


def test_candidates_are_drawn_at_temperature_1_unless_told(serving: Serving) -> None:
    told, untold = (summarize(serving, best_of=3, seed=3, **more) for more in ({"temperature": 1}, {}))
    assert told["results"] == untold["results"]
    assert untold["results"][0]["candidates"] is None


def test_scores_are_left_out_when_not_wanted_and_rank_all_the_same(serving: Serving) -> None:
    options = {"best_of": 4, "seed": 5, "return_candidates": True}
    [wanted] = summarize(serving, **options)["results"]
    [unwanted] = summarize(serving, return_scores=False, **options)["results"]
    assert [one["summary"] for one in unwanted["candidates"]] == [one["summary"] for one in wanted["candidates"]]
    assert [unwanted["score"], *(one["score"] for one in unwanted["candidates"])] == [None] * 5
    assert summarize(serving, return_scores=False)["results"][0]["score"] is None


def test_posts_that_do_not_fit_are_all_named(serving: Serving) -> None:
    posts = ["short", LONG_BODY, {"body": LONG_BODY}]
    problem = f"the post has {LONG_TOKENS} tokens and {MAX_PROMPT_TOKENS} fit; shorten it, or send truncation: body"
    for options in ({}, {"truncation": "error"}):
        wrong = refusal(serving.client.post("/summarize", json={"posts": posts, **options}))
        assert list(wrong) == ["posts.1", "posts.2"]
        assert all(message.startswith(problem) for message in wrong.values())


def test_a_post_that_does_not_fit_is_cut_as_in_training(serving: Serving, alone: Alone) -> None:
    post = Post("pets", "my cat", LONG_BODY)
    [result] = summarize(serving, [fields(post)], truncation="body")["results"]
    encoded = alone.prompt(post)
    assert result["cut_tokens"] == encoded.cut_tokens > 0
    assert result["prompt_tokens"] == len(encoded.ids) <= MAX_PROMPT_TOKENS
    assert result["prompt_tokens"] + result["cut_tokens"] == len(render_prompt(post).encode())
    assert_is(result, alone.write(post))


def test_a_post_fits_to_the_last_token(serving: Serving) -> None:
    room = MAX_PROMPT_TOKENS - BARE_TOKENS
    [result] = summarize(serving, ["a" * room])["results"]
    assert (result["prompt_tokens"], result["cut_tokens"]) == (MAX_PROMPT_TOKENS, 0)
    wrong = refusal(serving.client.post("/summarize", json={"posts": ["a" * (room + 1)]}))
    assert wrong["posts.0"].startswith(f"the post has {MAX_PROMPT_TOKENS + 1} tokens")


@pytest.mark.parametrize(
    ("raw", "post"),
    [
        (render_prompt(POST), POST),
        (f"\n {render_prompt(POST)} \n", POST),
        (render_prompt(POST).removesuffix("TL;DR:"), POST),
        (POST.body, Post("", "", POST.body)),
        (f"{POST.body}\nTL;DR:", Post("", "", POST.body)),
    ],
    ids=["a whole prompt", "with space around", "without its last line", "a body alone", "a body with the marker"],
)
def test_a_post_may_be_raw_text(raw: str, post: Post, serving: Serving, alone: Alone) -> None:
    [result] = summarize(serving, [raw])["results"]
    assert_is(result, alone.write(post))
