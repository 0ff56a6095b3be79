"""Bad steps: skipped, counted, listed; too many in a row end the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.checkpoint import StageDir
from rlhf.errors import DivergedError
from rlhf.health import Health, check_finite
from rlhf.telemetry import read_metrics


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    return StageDir(tmp_path / "run", "sft")


def listed(stage: StageDir) -> list[tuple[int, list[str]]]:
    return [(line["step"], line["ids"]) for line in read_metrics(stage.path / "bad-batches.jsonl")]


def test_a_fine_step_in_between_starts_the_count_anew(stage: StageDir) -> None:
    health = Health(stage, tolerate=2)
    health.skip(1, "the loss is nan", ["a", "b"])
    assert not health.is_well
    health.fine()
    assert health.is_well
    health.skip(3, "the loss is nan", ["c"])
    assert listed(stage) == [(1, ["a", "b"]), (3, ["c"])]
    assert health.skipped == 2


def test_too_many_in_a_row_end_the_training_with_the_ids_saved(stage: StageDir) -> None:
    with stage.publish(5):
        pass
    health = Health(stage, tolerate=2)
    health.skip(6, "the loss is nan", ["a"])
    with pytest.raises(
        DivergedError, match=r"2 steps of sft in a row.*step 7: the loss is inf.*step-00000005.*sft\.optimizer"
    ) as caught:
        health.skip(7, "the loss is inf", ["b"])
    assert caught.value.exit_code == 78
    assert listed(stage) == [(6, ["a"]), (7, ["b"])]


def test_a_resumed_run_lists_what_its_checkpoint_knew(stage: StageDir) -> None:
    health = Health(stage, tolerate=3)
    health.skip(1, "bad", ["a"])
    state = health.state_dict()
    health.skip(2, "bad", ["b"])  # and then the process is killed
    resumed = Health(stage, tolerate=3)
    resumed.load_state_dict(state)
    assert listed(stage) == [(1, ["a"])]
    assert (resumed.skipped, resumed.in_a_row) == (1, 1)


def test_weights_are_looked_at() -> None:
    check_finite({"a": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(DivergedError, match=r"^h\.1 is not finite, so nothing is saved"):
        check_finite({"a": torch.ones(2), "h.1": torch.tensor([1.0, float("inf")])})
