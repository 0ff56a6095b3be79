"""What comes in under `data.posts` and `data.comparisons`: rows parsed into records, bad ones reported."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlhf.data import Comparison, Example
from rlhf.errors import DataError
from rlhf.prompt import Post, check_unicode, parse_prompt, parse_summary
from rlhf.quoting import one_line
from rlhf.sources import RawRow, source_names

logger = logging.getLogger(__name__)

MAX_REPORTED_ROWS = 20

_Record = TypeVar("_Record", Example, Comparison)
_SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}


@dataclass(frozen=True)
class Placed(Generic[_Record]):
    """A record, the place it was read at and the split that its source gives it, if any."""

    record: _Record
    place: str
    split: str | None


@dataclass
class Intake:
    """What came in under one key (`data.posts` or `data.comparisons`) and what was left out, and why."""

    key: str
    names: list[str]
    rows: int = 0
    bad: int = 0
    first_bad: str = ""
    bad_reasons: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, key: str, setting: str | tuple[str, ...]) -> Intake:
        """An empty intake for the sources that a setting names."""
        return cls(key=key, names=source_names(setting))

    def report_bad(self, place: str, reason: str) -> None:
        """Count a bad row under its reason, and log it unless many were logged already."""
        self.bad += 1
        self.bad_reasons[reason.split(": ")[0]] += 1
        self.first_bad = self.first_bad or f"{place}: {reason}"
        if self.bad <= MAX_REPORTED_ROWS:
            logger.warning("bad row place=%s reason=%s", place, reason)

    def drop(self, split: str, reason: str, count: int = 1) -> None:
        """Count records that are in order but not wanted."""
        if count:
            self.dropped.setdefault(split, Counter())[reason] += count

    def check_bad(self, max_bad_fraction: float) -> None:
        """Raise DataError naming the first bad row when more than this share of the rows is bad."""
        if self.bad > max_bad_fraction * self.rows:
            needed = math.ceil(1000 * self.bad / self.rows) / 1000
            raise DataError(
                f"{self.first_bad}; {self.bad} of {self.rows} rows of {self.key} are bad, more than "
                f"data.max_bad_fraction={max_bad_fraction:g}; mend them or set data.max_bad_fraction={needed:g}"
            )

    def check_filled(self, splits: Mapping[str, Sequence[object]]) -> None:
        """Raise DataError naming the source when a split came out empty."""
        empty = [name for name, records in splits.items() if not records]
        if empty:
            dropped = sum(sum(reasons.values()) for reasons in self.dropped.values())
            raise DataError(
                f"{self.key}={','.join(self.names)}: no usable row for the {empty[0]} split ({self.rows} rows read, "
                f"{self.bad} bad, {dropped} dropped); add rows, or raise data.{_fraction_key(empty[0])} "
                "where the source has no such split"
            )


def parse_rows(rows: Iterable[RawRow], parse: Callable[[RawRow], _Record], intake: Intake) -> list[Placed[_Record]]:
    """Turn raw rows into records; what cannot be is reported to the intake."""
    placed = []
    for row in rows:
        intake.rows += 1
        try:
            if row.problem:
                raise ValueError(row.problem)
            placed.append(Placed(record=parse(row), place=row.place, split=_split_of(row)))
        except ValueError as error:
            intake.report_bad(row.place, str(error))
    return placed


def example_from(row: RawRow) -> Example:
    """Read `{prompt, label}`, `{prompt, summary}` or `{subreddit, title, body or post, summary}`.

    Raises ValueError with the reason when the row is none of them.
    """
    return Example(post=_post(row.columns), summary=_summary(row.columns, "label", "summary"), source=_source(row))


def comparison_from(row: RawRow) -> Comparison:
    """Read `{prompt, chosen, rejected}`, or the same with the post in columns, and an optional `margin`.

    Raises ValueError with the reason when the row is neither.
    """
    return Comparison(
        post=_post(row.columns),
        chosen=_summary(row.columns, "chosen"),
        rejected=_summary(row.columns, "rejected"),
        source=_source(row),
        margin=_margin(row.columns.get("margin")),
    )


def _post(columns: dict[str, Any]) -> Post:
    if columns.get("prompt") is not None:
        return parse_prompt(_text(columns, "prompt"))
    if columns.get("body") is None and columns.get("post") is None:
        raise ValueError(f"column prompt is missing: the row has {_names(columns)}")
    return Post(
        subreddit=_text(columns, "subreddit"), title=_text(columns, "title"), body=_text(columns, "body", "post")
    )


def _summary(columns: dict[str, Any], *names: str) -> str:
    summary = parse_summary(_text(columns, *names))
    if not summary:
        raise ValueError(f"the {names[0]} is empty")
    check_unicode(summary)
    return summary


def _text(columns: dict[str, Any], *names: str) -> str:
    """The first of these columns that holds something."""
    for name in names:
        value = columns.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"column {name} is not text: it holds a {type(value).__name__}")
        return value
    raise ValueError(f"column {' or '.join(names)} is missing: the row has {_names(columns)}")


def _names(columns: dict[str, Any]) -> str:
    return one_line(", ".join(str(name)[:40] for name in list(columns)[:8])) or "no columns"


def _source(row: RawRow) -> str:
    return str(row.columns.get("source") or row.source)


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"margin is not a number: it holds a {type(value).__name__}") from None
    if not math.isfinite(margin):
        raise ValueError("margin is not a number: it is not finite")
    return margin


def _split_of(row: RawRow) -> str | None:
    name = row.columns.get("split") or row.split
    if not name:
        return None
    split = _SPLIT_NAMES.get(str(name).lower().rstrip("0123456789").removesuffix("ation").removesuffix("ing"))
    if split is None:
        raise ValueError(f"unknown split: {str(name)[:40]!r} is none of train, valid, test")
    return split


def _fraction_key(split: str) -> str:
    return "test_fraction" if split == "test" else "valid_fraction"
