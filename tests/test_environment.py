"""PPO's environment: rows survive their file, and damaged ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.environment import EnvironmentRow, load_environment, write_environment
from rlhf.errors import DataError

ROW = EnvironmentRow("a1", [5, 0, 7], 2, -0.25)


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [ROW, EnvironmentRow("b2", [], 0, 1e-30)]
    write_environment(tmp_path, "train", rows)
    assert load_environment(tmp_path, "train") == rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "has other keys than an environment's"),
        (
            {"id": "a", "prompt_ids": [], "cut_tokens": 0},
            "has other keys than an environment's: id, prompt_ids, ",
        ),
        ({"id": 3}, "an impossible id: 3"),
        ({"prompt_ids": None}, "an impossible prompt_ids: None"),
        ({"prompt_ids": [1, -1]}, r"an impossible prompt_ids: \[1, -1\]"),
        ({"prompt_ids": [1.0]}, r"an impossible prompt_ids: \[1\.0\]"),
        ({"prompt_ids": [2**31]}, "an impossible prompt_ids"),
        ({"cut_tokens": True}, "an impossible cut_tokens: True"),
        ({"reference_score": float("nan")}, "an impossible reference_score: nan"),
        ({"reference_score": 10**400}, "an impossible reference_score"),
        ({"reference_score": "1"}, "an impossible reference_score: '1'"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = {"id": "a1", "prompt_ids": [5], "cut_tokens": 0, "reference_score": 0.5}
    whole = good | row if len(row) == 1 else row
    (tmp_path / "environment-train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(whole))
    with pytest.raises(DataError, match=f"environment-train.jsonl: row 2 has {reason.removeprefix('has ')}"):
        load_environment(tmp_path, "train")
