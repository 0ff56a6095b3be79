"""Raw rows to clean splits: what is refused and why, who goes where, what is dropped and counted."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rlhf.config import DataConfig
from rlhf.curate import cap, curate_comparisons, curate_posts
from rlhf.data import Comparison, Example
from rlhf.errors import DataError
from rlhf.intake import Intake, Placed, comparison_from, example_from, parse_rows
from rlhf.prompt import Post
from rlhf.sources import RawRow

PROMPT = "SUBREDDIT: r/a\nTITLE: b\nPOST: c"
LONG = "one two three four five"


def intake() -> Intake:
    return Intake.of("data.posts", "rows.jsonl")


def row(**columns: Any) -> RawRow:
    return RawRow(place="rows.jsonl:7", source="rows.jsonl", split="train", columns=columns)


def post(name: str) -> Post:
    return Post("a", name, "body")


def placed_posts(*named: tuple[str, str | None]) -> list[Placed[Example]]:
    return [Placed(Example(post(name), f"summary {n}", "x"), f"x:{n}", split) for n, (name, split) in enumerate(named)]


def placed_pairs(*pairs: tuple[str, str, str, str | None]) -> list[Placed[Comparison]]:
    return [Placed(Comparison(post(name), good, bad, "x"), "x:1", split) for name, good, bad, split in pairs]


def names(items: list[Placed[Example]] | list[Placed[Comparison]]) -> list[str]:
    return [item.record.post.title for item in items]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": PROMPT + "\nTL;DR: ", "label": "short"},
        {"prompt": PROMPT, "summary": "TL;DR: short"},
        {"subreddit": "r/a", "title": "b", "body": "c", "summary": "short", "id": "ignored", "extra": {}},
        {"subreddit": "a", "title": "b", "post": "c\r\n", "label": None, "summary": " short\n"},
    ],
)
def test_all_known_columns_give_one_example(columns: dict[str, Any]) -> None:
    assert example_from(row(**columns)) == Example(Post("a", "b", "c"), "short", "rows.jsonl")


@pytest.mark.parametrize(("margin", "read"), [(0.5, 0.5), (2, 2.0), ("1.5", 1.5), ("", None), (None, None)])
def test_a_comparison_is_read_with_its_margin(margin: Any, read: float | None) -> None:
    columns = {"prompt": PROMPT, "chosen": "TL;DR: good", "rejected": "bad", "source": "news", "margin": margin}
    assert comparison_from(row(**columns)) == Comparison(Post("a", "b", "c"), "good", "bad", "news", read)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"label": "x"}, "column prompt is missing: the row has label"),
        ({}, "column prompt is missing: the row has no columns"),
        ({"prompt": PROMPT}, "column label or summary is missing: the row has prompt"),
        ({"prompt": PROMPT, "label": ["x"]}, "column label is not text: it holds a list"),
        ({"prompt": 3, "label": "x"}, "column prompt is not text: it holds a int"),
        ({"prompt": "hello", "label": "x"}, "not a TL;DR prompt: line 1 does not begin with SUBREDDIT:"),
        ({"prompt": PROMPT, "label": " TL;DR: "}, "the label is empty"),
        ({"prompt": PROMPT, "label": "\ud800"}, "invalid Unicode: a lone surrogate at character 0"),
        ({"subreddit": "a", "title": "b", "body": " ", "summary": "s"}, "the post is empty"),
        (
            {"subreddit": "a", "body": "b", "summary": "s"},
            "column title is missing: the row has subreddit, body, summary",
        ),
        (
            {"prompt": PROMPT, "label": "x", "split": "holdout"},
            "unknown split: 'holdout' is none of train, valid, test",
        ),
    ],
)
def test_a_bad_row_is_logged_with_its_place_and_reason(
    columns: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    counts = intake()
    assert parse_rows([row(**columns)], example_from, counts) == []
    assert (counts.rows, counts.bad) == (1, 1)
    assert caplog.messages == [f"bad row place=rows.jsonl:7 reason={reason}"]


@pytest.mark.parametrize("margin", ["wide", [1], float("nan")])
def test_a_margin_that_is_no_number_is_bad(margin: Any) -> None:
    with pytest.raises(ValueError, match="margin is not a number"):
        comparison_from(row(prompt=PROMPT, chosen="a", rejected="b", margin=margin))


def test_twenty_bad_rows_are_logged_and_all_counted_by_reason(caplog: pytest.LogCaptureFixture) -> None:
    counts = intake()
    broken = RawRow("rows.jsonl:9", "rows.jsonl", None, problem="invalid JSON: Expecting value at column 1")
    parse_rows([row(label="x")] * 30 + [broken], example_from, counts)
    assert len(caplog.records) == 20
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert counts.bad_reasons == {"column prompt is missing": 30, "invalid JSON": 1}


def test_too_many_bad_rows_end_the_stage_naming_the_first() -> None:
    counts = intake()
    parse_rows([row(prompt=PROMPT, label="x")] * 298 + [row(prompt=PROMPT)] * 2, example_from, counts)
    counts.check_bad(0.01)
    with pytest.raises(DataError) as raised:
        counts.check_bad(0.005)
    assert str(raised.value) == (
        "rows.jsonl:7: column label or summary is missing: the row has prompt; 2 of 300 rows of data.posts are bad, "
        "more than data.max_bad_fraction=0.005; mend them or set data.max_bad_fraction=0.007"
    )


def test_an_empty_split_names_the_source() -> None:
    with pytest.raises(DataError, match=r"^data.posts=rows.jsonl: no usable row for the test split \(0 rows read"):
        intake().check_filled({"train": [1], "valid": [1], "test": []})


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("validation", "valid"), ("valid2", "valid"), ("DEV", "valid"), ("test", "test")],
)
def test_the_split_in_a_row_comes_before_that_of_its_file(name: str, split: str) -> None:
    [placed] = parse_rows([row(prompt=PROMPT, label="x", split=name)], example_from, intake())
    assert placed.split == split


def test_given_splits_are_kept() -> None:
    placed = placed_posts(("a", "train"), ("b", "valid"), ("c", "test"), ("d", None))
    splits = curate_posts(placed, intake(), DataConfig(valid_fraction=0.4, test_fraction=0.4))
    assert {name: names(items) for name, items in splits.items()} == {
        "train": ["a", "d"],
        "valid": ["b"],
        "test": ["c"],
    }


def test_missing_splits_are_cut_by_the_posts_hash() -> None:
    placed = placed_posts(*((f"post {n}", None) for n in range(2000)))
    config = DataConfig(valid_fraction=0.1, test_fraction=0.2)
    splits = curate_posts(placed, intake(), config)
    assert len(splits["valid"]) == pytest.approx(200, abs=40)
    assert len(splits["test"]) == pytest.approx(400, abs=55)
    again = curate_posts(placed[::-1], intake(), config)
    assert {name: set(names(items)) for name, items in again.items()} == {
        name: set(names(items)) for name, items in splits.items()
    }


def test_only_the_missing_split_is_cut() -> None:
    placed = placed_posts(("held out", "valid"), *((f"post {n}", "train") for n in range(500)))
    splits = curate_posts(placed, intake(), DataConfig(valid_fraction=0.1, test_fraction=0.1))
    assert names(splits["valid"]) == ["held out"]
    assert len(splits["test"]) == pytest.approx(50, abs=25)


def test_comparisons_of_a_post_fall_on_the_posts_side() -> None:
    titles = [f"post {n}" for n in range(1000)]
    config = DataConfig(valid_fraction=0.1, test_fraction=0.1)
    posts = curate_posts(placed_posts(*((title, None) for title in titles)), intake(), config)
    test_posts = {item.record.post.id for item in posts["test"]}
    pairs = placed_pairs(*((title, LONG, LONG + " six", None) for title in titles))
    splits = curate_comparisons(pairs, intake(), config, test_posts=test_posts, min_words=5)
    assert names(splits["valid"]) == names(posts["valid"])
    assert names(splits["train"]) == names(posts["train"])


def test_duplicates_and_leaks_are_dropped_and_counted() -> None:
    counts = intake()
    placed = placed_posts(
        *(("a", "train"), ("a", "train"), ("b", "train"), ("c", "train"), ("d", "train")),
        *(("b", "valid"), ("e", "valid"), ("f", "valid"), ("f", "valid"), ("c", "test"), ("e", "test")),
    )
    splits = curate_posts(placed, counts, DataConfig())
    assert {name: names(items) for name, items in splits.items()} == {
        "train": ["a", "d"],
        "valid": ["b", "f"],
        "test": ["c", "e"],
    }
    assert splits["train"][0].record.summary == "summary 0"
    assert counts.dropped == {
        "train": {"duplicate": 1, "leak: also in a held-out split": 2},
        "valid": {"duplicate": 1, "leak: also in posts-test": 1},
    }


def test_useless_pairs_are_dropped_and_counted() -> None:
    counts = intake()
    pairs = placed_pairs(
        ("a", LONG, LONG + " six", "train"),
        ("a", LONG, LONG + " six", "train"),
        ("a", LONG + " six", LONG, "train"),
        ("a", LONG, LONG, "train"),
        ("a", LONG, "four words are few", "train"),
        ("tested", LONG, LONG + " six", "train"),
        ("held out", LONG, LONG + " six", "train"),
        ("held out", LONG, LONG + " six", "valid"),
        ("tested", LONG, LONG + " six", "test"),
    )
    splits = curate_comparisons(pairs, counts, DataConfig(), test_posts={post("tested").id}, min_words=5)
    assert [(p.record.chosen, p.record.post.title) for p in splits["train"]] == [(LONG, "a"), (LONG + " six", "a")]
    assert names(splits["valid"]) == ["held out", "tested"]
    assert counts.dropped == {
        "train": {
            "equal summaries": 1,
            "summary too short": 1,
            "duplicate": 1,
            "leak: also in posts-test": 1,
            "leak: also in comparisons-valid": 1,
        }
    }


def test_a_cap_keeps_a_seeded_choice_in_file_order() -> None:
    placed = placed_posts(*((f"post {n}", None) for n in range(100)))
    counts = intake()
    kept = cap(placed, 10, seed=1, intake=counts, split="train")
    positions = [placed.index(item) for item in kept]
    assert positions == sorted(positions)
    assert positions != list(range(10))
    assert counts.dropped == {"train": {"over the cap": 90}}
    assert {id(item) for item in cap(placed[::-1], 10, seed=1, intake=counts, split="train")} == {
        id(item) for item in kept
    }
    assert cap(placed, 10, seed=2, intake=counts, split="train") != kept
    assert cap(placed, None, seed=1, intake=counts, split="train") == placed
