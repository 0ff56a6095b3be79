"""Records and their JSONL files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Comparison, Example, load_comparisons, load_examples, read_jsonl, write_jsonl
from rlhf.errors import DataError
from rlhf.prompt import Post

POST = Post("tifu", "A title", "One.\nTwo 北京 \u2028 🙂.")


def test_examples_survive_their_file(tmp_path: Path) -> None:
    examples = [Example(POST, "short", "reddit"), Example(POST, "é\u2028x", "made", extra={"facts": ["a", "b"]})]
    write_jsonl(tmp_path / "posts-train.jsonl", (example.to_row() for example in examples))
    assert load_examples(tmp_path, "train") == examples


def test_comparisons_survive_their_file(tmp_path: Path) -> None:
    pairs = [
        Comparison(POST, "good", "bad", "news", margin=0.5),
        Comparison(POST, "a", "b", "x", extra={"clean": True}),
    ]
    write_jsonl(tmp_path / "comparisons-valid.jsonl", (pair.to_row() for pair in pairs))
    assert load_comparisons(tmp_path, "valid") == pairs


def test_rows_have_the_documented_columns() -> None:
    assert list(Example(POST, "s", "x").to_row()) == ["id", "subreddit", "title", "body", "summary", "source", "extra"]
    assert list(Comparison(POST, "a", "b", "x").to_row()) == [
        *("id", "subreddit", "title", "body", "chosen", "rejected", "source", "margin", "extra")
    ]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "invalid JSON: Expecting value at column 7"),
        (b'{"a": "\xff"}', "invalid UTF-8: byte 7"),
        (b"[1]", "not an object: it is a list"),
        (b"[" * 100_000, "invalid JSON: nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"rows.jsonl:3: {reason}$"):
        list(read_jsonl(tmp_path / "rows.jsonl"))


def test_a_row_that_is_no_record_is_named(tmp_path: Path) -> None:
    row = Example(POST, "s", "x").to_row()
    del row["summary"]
    write_jsonl(tmp_path / "posts-test.jsonl", [row])
    with pytest.raises(DataError, match=r"posts-test.jsonl:1: key summary is missing"):
        load_examples(tmp_path, "test")


def test_a_missing_file_is_named_with_the_stage_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file at .*posts-train.jsonl; run `rlhf fetch`"):
        load_examples(tmp_path, "train")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": 3}, "chosen holds a int, not text"),
        ({"rejected": None}, "rejected holds a NoneType, not text"),
        ({"body": ["x"]}, "body holds a list, not text"),
        ({"chosen": "\ud800"}, "invalid Unicode: a lone surrogate"),
        ({"extra": [1]}, "extra holds a list, not an object"),
        ({"margin": "2"}, "margin holds '2', no finite number"),
        ({"margin": 10**400}, "margin holds 1000"),
        ({"margin": float("nan")}, "margin holds nan, no finite number"),
    ],
)
def test_a_published_row_with_a_value_of_another_kind_is_named(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    row = Comparison(POST, "good", "bad", "news", margin=0.5).to_row() | changes
    (tmp_path / "comparisons-train.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=f"comparisons-train.jsonl:1: {reason}"):
        load_comparisons(tmp_path, "train")
