"""/score over HTTP: the numbers are those of rlhf's own scoring, to 1e-4, whatever they are batched with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoint import fingerprint
from rlhf.prompt import Post, render_prompt
from tests.alone import Alone
from tests.fakes import EOS_ID, POSITIONS
from tests.served_run import MAX_PROMPT_TOKENS, STEPS, served_run
from tests.serving import Serving, fields, post_of, refusal, serving_run

POST = post_of(0)
LONG_BODY = "I lost my cat today. " * 20


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("score"))


@pytest.fixture(scope="module")
def alone(run_dir: Path) -> Alone:
    return Alone(run_dir)


@pytest.fixture(scope="module")
def serving(run_dir: Path) -> Iterator[Serving]:
    with serving_run(run_dir) as started:
        yield started


def score(serving: Serving, items: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    answer = serving.client.post("/score", json={"items": items, **options})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == answer.headers["x-request-id"]
    return answer.json()


def test_a_score_is_that_of_rlhf_whatever_it_is_batched_with(serving: Serving, alone: Alone) -> None:
    pairs = [(post_of(number), "it was lost, " * (number % 4) + str(number)) for number in range(40)]
    expected = [alone.score(post, summary) for post, summary in pairs]
    items = [{"post": fields(post), "summary": summary} for post, summary in pairs]
    answer = score(serving, items)
    assert (answer["run"], answer["step"]) == ("served", STEPS["reward"])
    assert [result["index"] for result in answer["results"]] == list(range(40))
    assert [result["score"] for result in answer["results"]] == pytest.approx(expected, abs=1e-4)
    assert [score(serving, [item])["results"][0]["score"] for item in items] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) > 30


def test_a_reference_gives_a_difference(serving: Serving, alone: Alone) -> None:
    summaries = [("lost a cat", "cats"), ("lost a cat", None), ("lost a cat", ""), ("", "lost a cat")]
    posts = [post_of(number) for number in range(len(summaries))]
    items = [
        {"post": fields(post), "summary": summary} | ({} if reference is None else {"reference": reference})
        for post, (summary, reference) in zip(posts, summaries, strict=True)
    ]
    results = score(serving, items)["results"]
    for post, (summary, reference), result in zip(posts, summaries, results, strict=True):
        assert result["score"] == pytest.approx(alone.score(post, summary), abs=1e-4)
        if reference is None:
            assert (result["reference_score"], result["delta"]) == (None, None)
        else:
            assert result["reference_score"] == pytest.approx(alone.score(post, reference), abs=1e-4)
            assert result["delta"] == pytest.approx(result["score"] - result["reference_score"], abs=1e-6)


def test_tokens_are_counted(serving: Serving) -> None:
    [result] = score(serving, [{"post": fields(POST), "summary": "lost é"}])["results"]
    assert (result["prompt_tokens"], result["cut_tokens"]) == (len(render_prompt(POST).encode()), 0)
    assert result["summary_tokens"] == len(" lost é".encode()) + 1  # and the end-of-text token


@pytest.mark.parametrize("given", ["  lost a\ncat \n", "lost a\r\ncat", "TL;DR: lost a\ncat"])
def test_a_summary_is_read_as_the_data_is(given: str, serving: Serving, alone: Alone) -> None:
    [result] = score(serving, [{"post": fields(POST), "summary": given, "reference": given}])["results"]
    assert result["score"] == pytest.approx(alone.score(POST, "lost a\ncat"), abs=1e-4)
    assert result["delta"] == pytest.approx(0, abs=1e-6)


def test_a_summary_that_does_not_fit_beside_its_post_is_named(serving: Serving) -> None:
    room = POSITIONS - len(render_prompt(POST).encode())
    fitting, long = "a" * (room - 2), "a" * (room - 1)
    items = [
        {"post": fields(POST), "summary": fitting, "reference": fitting},
        {"post": fields(POST), "summary": long},
        {"post": fields(POST), "summary": "a", "reference": long},
    ]
    told = f"the summary has {room + 1} tokens and {room} fit beside the post; shorten it"
    answer = serving.client.post("/score", json={"items": items})
    assert refusal(answer) == {"items.1.summary": told, "items.2.reference": told}
    assert score(serving, items[:1])["results"][0]["summary_tokens"] == room


def test_a_long_post_is_refused_or_cut_before_it_is_scored(serving: Serving, alone: Alone) -> None:
    post = Post("", "", LONG_BODY)
    item = {"post": LONG_BODY, "summary": "lost a cat"}
    wrong = refusal(serving.client.post("/score", json={"items": [item]}))
    assert wrong["items.0.post"].startswith(
        f"the post has {len(render_prompt(post))} tokens and {MAX_PROMPT_TOKENS} fit"
    )
    [result] = score(serving, [item], truncation="body")["results"]
    assert result["cut_tokens"] == alone.prompt(post).cut_tokens > 0
    assert result["prompt_tokens"] == len(alone.prompt(post).ids)
    assert result["score"] == pytest.approx(alone.score(post, "lost a cat"), abs=1e-4)


def test_token_ids_are_scored_as_they_are(serving: Serving, alone: Alone) -> None:
    """Among texts, at full length, and with the end-of-text token only where it was written."""
    written = [(post_of(number), list(range(number + 1))) for number in range(6)]
    sequences = [[*alone.prompt(post).ids, *ids] for post, ids in written] + [[*alone.prompt(POST).ids, 7, EOS_ID]]
    sequences.append([number % 256 for number in range(POSITIONS)])
    items = [{"token_ids": ids} for ids in sequences]
    answer = score(serving, [{"post": fields(POST), "summary": "lost", "reference": "cat"}, *items])
    told, *results = answer["results"]
    assert told["score"] == pytest.approx(alone.score(POST, "lost"), abs=1e-4)
    assert told["reference_score"] == pytest.approx(alone.score(POST, "cat"), abs=1e-4)
    assert [result["score"] for result in results] == pytest.approx([alone.of(ids) for ids in sequences], abs=1e-4)
    unknown = ("reference_score", "delta", "prompt_tokens", "summary_tokens")
    assert {tuple(result[key] for key in unknown) for result in results} == {(None, None, None, None)}


def test_an_answer_tells_which_reward_model_it_is_of(serving: Serving, run_dir: Path) -> None:
    answer = score(serving, [{"token_ids": [1, 2]}])
    [served] = [one for one in serving.client.get("/v1/models").json()["models"] if one["id"] == "reward"]
    assert answer["checksum"] == served["checksum"] == fingerprint(run_dir / "reward" / "final")


def test_a_score_that_is_no_number_is_null_in_tokens_and_an_error_in_text(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = serving.service._served.reward.scorer  # type: ignore[union-attr]
    real = type(scorer).score

    def broken(sequences: Any, **how: Any) -> torch.Tensor:
        wrong = torch.tensor([len(sequence) == 3 for sequence in sequences])
        return real(scorer, sequences, **how).masked_fill(wrong, math.inf)

    monkeypatch.setattr(scorer, "score", broken)
    items = [{"token_ids": [1, 2]}, {"token_ids": [1, 2, 3]}]
    good, bad = score(serving, items)["results"]
    assert (type(good["score"]), bad["score"]) == (float, None)
    monkeypatch.setattr(scorer, "score", lambda sequences, **how: torch.full((len(sequences),), math.nan))
    text = {"post": "a", "summary": "b"}
    for asked in ([text], [*items, text]):
        answer = serving.client.post("/score", json={"items": asked})
        assert refusal(answer, 500, "score-not-finite") == {}


def test_what_is_asked_of_one_post_reaches_the_scorer_together(
    serving: Serving, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = serving.service._served.reward.scorer  # type: ignore[union-attr]
    real = type(scorer).score
    asked: list[list[list[int]]] = []

    def heard(sequences: Any, **how: Any) -> torch.Tensor:
        asked.append([list(sequence) for sequence in sequences])
        return real(scorer, sequences, **how)

    monkeypatch.setattr(scorer, "score", heard)
    posts = [post_of(0), post_of(1)]
    score(serving, [{"post": fields(POST), "summary": text, "reference": "lost"} for text in ("a cat", "a dog")])
    sent = {"posts": [fields(post) for post in posts], "best_of": 4, "temperature": 1.0}
    answer = serving.client.post("/summarize", json=sent)
    assert answer.status_code == 200, answer.text
    pairs, *candidates = asked
    assert len(pairs) == 4
    assert pairs[1] == pairs[3]  # the references, each after its summary
    for post in posts:
        prompt = list(alone.prompt(post).ids)
        found = [sum(ids[: len(prompt)] == prompt for ids in batch) for batch in candidates]
        assert [count for count in found if count] == [4]
