"""The benchmark beside trlX runs; what it says is for people."""

from __future__ import annotations

from pathlib import Path

from accelerate.state import AcceleratorState

from tests.benchmarks.trlx_ppo import PHASES, parser, prepare, run_engine, table

SMALL = {"layers": 2, "hidden": 64, "vocabulary": 260, "prompt": 16, "response": 8, "rollouts": 16, "iterations": 2}


def test_our_engine_is_measured(tmp_path: Path) -> None:
    options = parser().parse_args([f"--{name}={size}" for name, size in SMALL.items()])
    prepare(tmp_path / "run", options)
    try:
        found = run_engine("builtin", tmp_path / "run", options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(found[phase] > 0 for phase in PHASES)
    assert found["tokens"] == 8  # it never ends by itself
    assert len(table({"builtin": found}).splitlines()) == 1 + len(found)


def test_the_table_has_ratios() -> None:
    lines = table({"builtin": {"train": 2.0}, "trlx": {"train": 3.0}}).splitlines()
    assert lines[1].split() == ["train", "2.000", "3.000", "1.50"]
