"""Posts with summaries and comparisons of two summaries: the records, and their files.

The files are JSONL in UTF-8: `posts-{train,valid,test}.jsonl`, `comparisons-{train,valid}.jsonl`.
`rlhf.intake` makes the records out of rows in the wild; every stage after `fetch` reads them here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import DataError
from rlhf.prompt import Post, check_unicode
from rlhf.quoting import shown

POST_SPLITS = ("train", "valid", "test")
COMPARISON_SPLITS = ("train", "valid")

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Example:
    """A post with its reference summary.

    source says where it comes from. extra holds what is known of synthetic posts (facts, clean labels); only
    evaluation and the reward model's metrics may read it. It is empty for real posts.
    """

    post: Post
    summary: str
    source: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The record as a line of `posts-*.jsonl`."""
        return {**_post_row(self.post), "summary": self.summary, "source": self.source, "extra": self.extra}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Example:
        """Read back what `to_row` wrote. Raises KeyError for a missing key, TypeError for a value of another kind."""
        return cls(
            post=_post_from_row(row),
            summary=_text(row, "summary"),
            source=_text(row, "source"),
            extra=_extra(row),
        )


@dataclass(frozen=True)
class Comparison:
    """Two summaries of a post, one preferred by a judge.

    margin is how far apart the judge's ratings were, in the source's own unit, where the source tells.
    """

    post: Post
    chosen: str
    rejected: str
    source: str
    margin: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The record as a line of `comparisons-*.jsonl`."""
        return {
            **_post_row(self.post),
            "chosen": self.chosen,
            "rejected": self.rejected,
            "source": self.source,
            "margin": self.margin,
            "extra": self.extra,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Comparison:
        """Read back what `to_row` wrote. Raises KeyError for a missing key, TypeError for a value of another kind."""
        margin = row.get("margin")
        if margin is not None and not is_number(margin):
            raise TypeError(f"margin holds {shown(margin)}, no finite number")
        return cls(
            post=_post_from_row(row),
            chosen=_text(row, "chosen"),
            rejected=_text(row, "rejected"),
            source=_text(row, "source"),
            margin=margin,
            extra=_extra(row),
        )


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, skipping blank lines.

    Raises DataError naming file and line for anything that is not a JSON object.
    """
    for number, row in _numbered_rows(Path(path)):
        if isinstance(row, ValueError):
            raise DataError(f"{path}:{number}: {row}")
        yield row


def json_object(line: bytes) -> dict[str, Any]:
    """Decode one line of JSONL. Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object: it is a {type(row).__name__}")
    return row


def is_number(value: Any) -> bool:
    """Whether this is an int or a float, finite, and not too large for a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def load_examples(data_dir: Path, split: str) -> list[Example]:
    """Read `posts-SPLIT.jsonl`. Raises DataError naming file and line when it is missing or damaged."""
    return _load(Path(data_dir) / f"posts-{split}.jsonl", Example.from_row)


def load_comparisons(data_dir: Path, split: str) -> list[Comparison]:
    """Read `comparisons-SPLIT.jsonl`. Raises DataError naming file and line when it is missing or damaged."""
    return _load(Path(data_dir) / f"comparisons-{split}.jsonl", Comparison.from_row)


def _load(path: Path, from_row: Callable[[dict[str, Any]], _Record]) -> list[_Record]:
    records = []
    for number, row in _numbered_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            records.append(from_row(row))
        except KeyError as error:
            raise DataError(f"{path}:{number}: key {error.args[0]} is missing") from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
    return records


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    if not path.is_file():
        raise DataError(f"no data file at {path}; run `rlhf fetch` for this run again")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json_object(line)
            except ValueError as error:
                yield number, error


def _post_row(post: Post) -> dict[str, Any]:
    return {"id": post.id, "subreddit": post.subreddit, "title": post.title, "body": post.body}


def _post_from_row(row: dict[str, Any]) -> Post:
    return Post(subreddit=_text(row, "subreddit"), title=_text(row, "title"), body=_text(row, "body"))


def _text(row: dict[str, Any], key: str) -> str:
    """Raises ValueError for what UTF-8 cannot carry: a tokenizer would fail on it."""
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} holds a {type(value).__name__}, not text")
    check_unicode(value)
    return value


def _extra(row: dict[str, Any]) -> dict[str, Any]:
    extra = row.get("extra") or {}
    if not isinstance(extra, dict):
        raise TypeError(f"extra holds a {type(extra).__name__}, not an object")
    return extra
