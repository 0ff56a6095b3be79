"""PPO's environment: prompts as token ids, each with the score of its reference summary.

`prepare` writes it, `ppo` reads it: environment-{train,valid}.jsonl, a row a post.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlhf.data import is_number, read_jsonl, write_jsonl
from rlhf.errors import DataError
from rlhf.quoting import one_line, shown


@dataclass(frozen=True)
class EnvironmentRow:
    """A post's id, its prompt cut to fit, the body's tokens lost to that, and its reference's score."""

    id: str
    prompt_ids: list[int]
    cut_tokens: int
    reference_score: float


def write_environment(prepare_dir: Path, split: str, rows: Iterable[EnvironmentRow]) -> None:
    """Write `environment-SPLIT.jsonl`."""
    write_jsonl(_path(prepare_dir, split), (asdict(row) for row in rows))


def load_environment(prepare_dir: Path, split: str) -> list[EnvironmentRow]:
    """Read `environment-SPLIT.jsonl`. Raises DataError naming file and row when one is damaged."""
    path = _path(prepare_dir, split)
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if row.keys() != {field.name for field in fields(EnvironmentRow)}:
            raise DataError(f"{path}: row {number} has other keys than an environment's: {one_line(', '.join(row))}")
        if wrong := _wrong_key(row):
            raise DataError(f"{path}: row {number} has an impossible {wrong}: {shown(row[wrong])}")
        rows.append(EnvironmentRow(**row))
    return rows


def _wrong_key(row: dict[str, Any]) -> str:
    """The first key whose value is not what `prepare` writes; empty where all are."""
    right = {
        "id": isinstance(row["id"], str),
        "prompt_ids": isinstance(row["prompt_ids"], list) and all(map(_is_count, row["prompt_ids"])),
        "cut_tokens": _is_count(row["cut_tokens"]),
        "reference_score": is_number(row["reference_score"]),
    }
    return next((key for key, is_right in right.items() if not is_right), "")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _path(prepare_dir: Path, split: str) -> Path:
    return prepare_dir / f"environment-{split}.jsonl"
