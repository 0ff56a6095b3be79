"""Rows in the wild: every format gives the same rows, and each bad one its place and reason."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf.errors import DataError, RlhfError
from rlhf.sources import RawRow, read_rows, split_of_file

ROWS = [
    {"prompt": "SUBREDDIT: r/a\nTITLE: x\nPOST: one\nTL;DR:", "label": 'é, "quoted"'},
    {"prompt": "SUBREDDIT: r/b\nTITLE: \nPOST: two\r\nlines 北京", "label": "TL;DR: second"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.name.lower().endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.name.lower().endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.name.lower().endswith(".gz") else lines.encode())
    return path


def read(setting: object) -> list[RawRow]:
    return list(read_rows(str(setting), key="data.posts"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "ROWS.JSONL.GZ", "rows.csv", "rows.Parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = read(write_rows(tmp_path / name, ROWS))
    assert [row.columns for row in rows] == ROWS
    assert {(row.source, row.split, row.problem) for row in rows} == {(name, None, "")}


def test_places_are_lines_or_row_numbers(tmp_path: Path) -> None:
    assert [r.place for r in read(write_rows(tmp_path / "a.jsonl", ROWS))] == [
        f"{tmp_path}/a.jsonl:{n}" for n in (1, 2)
    ]
    # The header is line 1, and the first prompt has four lines.
    assert [r.place for r in read(write_rows(tmp_path / "a.csv", ROWS))] == [f"{tmp_path}/a.csv:{n}" for n in (2, 6)]
    assert [r.place for r in read(write_rows(tmp_path / "a.parquet", ROWS))] == [
        f"{tmp_path}/a.parquet: row {n}" for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("training-part2.csv", "train"),
        ("Validation.jsonl.gz", "valid"),
        ("valid1.jsonl", "valid"),
        ("test-00000-of-00001.parquet", "test"),
        ("posts-train.jsonl", "train"),
        ("comparisons_valid.jsonl", "valid"),
        ("testimony.jsonl", None),
        ("latest.jsonl", None),
        ("my-train-of-thought.jsonl", None),
        ("tldr.jsonl.gz", None),
    ],
)
def test_a_file_name_tells_the_split(name: str, split: str | None) -> None:
    assert split_of_file(Path(name)) == split


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "valid.csv", ROWS[1:])
    write_rows(tmp_path / "train.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not rows")
    assert [(row.split, row.columns) for row in read(tmp_path)] == [("train", ROWS[0]), ("valid", ROWS[1])]


def test_several_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    names = tuple(str(write_rows(tmp_path / name, ROWS[:1])) for name in ("b.jsonl", "a.csv"))
    assert [row.source for row in read_rows(names, key="data.posts")] == ["b.jsonl", "a.csv"]


def test_broken_json_lines_are_handed_on_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": \n{"a": "\xff"}\n"text"\n{"a": 2}')
    assert [(row.place.rpartition(":")[2], row.problem) for row in read(path)] == [
        ("1", ""),
        ("3", "invalid JSON: Expecting value at column 7"),
        ("4", "invalid UTF-8: byte 7"),
        ("5", "not an object: it is a str"),
        ("6", ""),
    ]


def test_a_broken_csv_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"prompt\n')
    with pytest.raises(DataError, match=r"rows\.csv:1: invalid CSV: unexpected end of data; mend the header line"):
        list(read_rows(str(path), key="data.posts"))


@pytest.mark.parametrize("name", ["x" * 300 + "/rows.csv", "a\0/b.jsonl", "/\ud800", "../" + "y" * 5000])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        list(read_rows(name, key="data.posts"))
    assert str(caught.value).isprintable()


def test_broken_csv_rows_are_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,label\na,b\na\n\n"a" x,b\n\xff,b\nc,d\n')
    assert [(row.place.rpartition(":")[2], row.problem) for row in read(path)] == [
        ("2", ""),
        ("3", "wrong number of columns: 1 instead of the header's 2"),
        ("5", "invalid CSV: ',' expected after '\"'"),
        ("6", "invalid UTF-8"),
        ("7", ""),
    ]


def test_an_empty_csv_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    assert read(tmp_path / "a.csv") == []


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "foreign.jsonl.gz", "foreign.parquet"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(json.dumps(ROWS[0]).encode())
    (tmp_path / name).write_bytes(whole[:-9] if name.startswith("cut") else b"something else")
    with pytest.raises(DataError, match=f"^{tmp_path}/{name} cannot be read: ") as raised:
        read(tmp_path / name if name else "")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "^data.posts=.*/missing.jsonl: no such file; check the path"),
        ("", "^data.posts=: no such file or directory"),
        ("missing/folder", "^data.posts=.*/missing/folder: no such file or directory; check the path"),
        ("rows.xml", "unknown kind of file; give one of .jsonl, .jsonl.gz, .csv, .parquet"),
        ("empty", "^data.posts=.*/empty holds no .jsonl, .jsonl.gz, .csv, .parquet file"),
    ],
)
def test_what_is_not_there_is_named_with_its_key(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "rows.xml").write_text("<rows/>")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        read(tmp_path / name if name else "")


def test_a_hub_data_set_gives_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS), "valid1": datasets.Dataset.from_list(ROWS[:1])}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: datasets.DatasetDict(splits) if name == "some/set" else 1
    )
    rows = read("some/set")
    assert [(row.place, row.split, row.source) for row in rows] == [
        ("some/set[train]: row 1", "train", "some/set"),
        ("some/set[train]: row 2", "train", "some/set"),
        ("some/set[valid1]: row 1", "valid1", "some/set"),
    ]
    assert [row.columns for row in rows] == [*ROWS, ROWS[0]]


def hub_that_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Iterator[RawRow]:
    import datasets

    def load(_: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    return read_rows("some/set", key="data.posts")


def test_a_hub_out_of_reach_asks_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = hub_that_raises(monkeypatch, ConnectionError("Couldn't reach 'some/set'\non the Hub"))
    with pytest.raises(
        RlhfError, match=r"^data.posts=some/set: no such local path, and the Hub cannot be reached"
    ) as raised:
        next(rows)
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)


def test_a_data_set_that_does_not_exist_is_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    rows = hub_that_raises(monkeypatch, DatasetNotFoundError("no such set"))
    with pytest.raises(DataError, match=r"^data.posts=some/set: neither a local path nor a repository on the Hub"):
        next(rows)


def test_a_data_set_that_cannot_be_loaded_is_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = hub_that_raises(monkeypatch, ValueError("scripts are\nno longer supported"))
    with pytest.raises(DataError, match=r"^data.posts=some/set cannot be loaded: scripts are no longer supported$"):
        next(rows)
