"""PPO's environment: prompts as token ids, each with the score of its reference summary.

`prepare` writes it, `ppo` reads it: environment-{train,valid}.jsonl, a row a post.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.data import read_jsonl, write_jsonl
from rlhf.errors import DataError


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
        try:
            rows.append(EnvironmentRow(**row))
        except TypeError as error:
            raise DataError(f"{path}: row {number} has other keys than an environment's: {', '.join(row)}") from error
    return rows


def _path(prepare_dir: Path, split: str) -> Path:
    return prepare_dir / f"environment-{split}.jsonl"
