"""Stops, crashes and bad numbers at a chosen place of a training, and what two runs are compared by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from rlhf import training
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import StopRequested
from rlhf.stages import reward, sft
from rlhf.stopping import StopSignal
from rlhf.telemetry import read_metrics
from rlhf.training_setup import Learner

PROGRAMS = {"sft": sft.run, "reward": reward.run}


class StopAtLook:
    """A stop signal that comes before the loop looks for it the n-th time; it looks before each step and batch."""

    def __init__(self, look: int) -> None:
        self.look, self.looks = look, 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        yield

    @property
    def requested(self) -> bool:
        self.looks += 1
        return self.looks >= self.look

    def request(self) -> None:
        """Hear that all processes have agreed to stop."""


def run(stage: str, config: Config, run_dir: Path, stop: Any = None) -> StageDir:
    """Run a stage in this process, as one of its own would."""
    directory = StageDir(run_dir, stage)
    try:
        PROGRAMS[stage](config, directory, stop or StopSignal())
    finally:
        # accelerate keeps a process's precision for good; a stage has a process of its own.
        AcceleratorState._reset_state(reset_partial_state=True)
    return directory


def run_in_steps(stage: str, config: Config, run_dir: Path, patch: pytest.MonkeyPatch) -> int:
    """Stop after every single step and go on; how often it was stopped."""
    stops, stop = 0, StopSignal()

    def one_step(*arguments: Any) -> training.Step:
        stop.request()
        return optimise(*arguments)

    optimise = training.optimise
    patch.setattr(training, "optimise", one_step)
    while not StageDir(run_dir, stage).is_final():
        stop.requested = False
        try:
            run(stage, config, run_dir, stop)
        except StopRequested:
            stops += 1
    patch.setattr(training, "optimise", optimise)
    return stops


def sicken(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps, counted from 1, not a number."""
    update: Callable[..., tuple[float, str | None]] = training.update

    def sick(learner: Learner, loss: float, *, clip: float) -> tuple[float, str | None]:
        return update(learner, math.nan if learner.position.step + 1 in steps else loss, clip=clip)

    patch.setattr(training, "update", sick)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_bits(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(stage: StageDir) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = read_metrics(stage.path / "metrics.jsonl")
    timed = ("time", "time/save_seconds", f"{stage.stage}/tokens_per_second")
    assert all(f"{stage.stage}/loss" not in row or row.keys() >= set(timed) for row in rows)
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same_run(ours: StageDir, theirs: StageDir) -> None:
    """The same weights, bit for bit, and the same metrics, without gaps or doubles."""
    assert_same_bits(ours.final(), theirs.final())
    assert lines(ours) == lines(theirs)
    first, second = (json.loads((stage.final() / "metrics.json").read_text()) for stage in (ours, theirs))
    assert first == second
