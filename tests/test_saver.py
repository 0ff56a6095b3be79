"""Checkpoints in the background: one at a time, failures told, the training's numbers as they were."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from rlhf.checkpoint import StageDir
from rlhf.errors import StopRequested, StorageError
from rlhf.saver import HostBuffers, Saver
from rlhf.telemetry import Metrics


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    return StageDir(tmp_path / "run", "sft")


def writes(text: str):
    return lambda directory: (directory / "weights").write_text(text)


def test_the_training_goes_on_while_the_disk_is_busy_and_the_next_save_waits(stage: StageDir) -> None:
    free, order = threading.Event(), []

    def slow(directory: Path) -> None:
        free.wait(30)
        order.append("first written")
        writes("one")(directory)

    with Saver(stage, keep=2) as saver:
        saver.save(1, slow)
        order.append("training")
        threading.Timer(0.1, free.set).start()
        saver.save(2, lambda directory: (order.append("second written"), writes("two")(directory)))
    assert order == ["training", "first written", "second written"]
    assert [step for step, _ in stage.steps()] == [1, 2]


def test_pruned_and_pointed(stage: StageDir) -> None:
    with Saver(stage, keep=1) as saver:
        for step in range(1, 5):
            saver.save(step, writes(str(step)), best=step == 2, final=step == 4)
    assert [step for step, _ in stage.steps()] == [2, 4]
    assert (stage.path / "best" / "weights").read_text() == "2"
    assert (stage.final() / "weights").read_text() == "4"


def full(directory: Path) -> None:
    raise OSError(errno.ENOSPC, "refused")


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_what_goes_wrong_is_raised(stage: StageDir, when: str) -> None:
    with pytest.raises(StorageError, match="the volume is full"), Saver(stage, keep=2) as saver:
        saver.save(1, writes("one"))
        saver.save(2, full)
        if when == "at the next save":
            saver.save(3, writes("three"))
            pytest.fail("the failure was not told")
    assert [step for step, _ in stage.steps()] == [1]


def test_an_error_that_is_on_its_way_is_not_replaced(stage: StageDir, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StopRequested), Saver(stage, keep=2) as saver:
        saver.save(1, full)
        raise StopRequested("stop")
    assert "the last checkpoint was not saved: " in caplog.text


def test_other_processes_save_nothing(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with Saver(stage, keep=2) as saver:
        saver.save(1, writes("one"))
    assert stage.steps() == []


def test_metrics_are_on_the_disk_before_the_checkpoint_that_follows_them(
    stage: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(Metrics, "sync", lambda self: order.append("metrics"))
    metrics = Metrics(stage, tensorboard=False)
    with metrics, Saver(stage, keep=2, metrics=metrics) as saver:
        saver.save(1, lambda directory: order.append("checkpoint"))
    assert order == ["metrics", "checkpoint"]


def test_a_host_copy_is_of_its_own_and_its_memory_is_kept() -> None:
    host = HostBuffers()
    weights = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    copies = host.copy(weights.items())
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in weights.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], expected[name]) for name in weights)
    assert copies["a"].is_contiguous()
    assert copies["b"].dtype == torch.bfloat16
    again = host.copy(weights.items())
    assert all(again[name].data_ptr() == copies[name].data_ptr() for name in weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert host.copy([("a", torch.ones(1))])["a"].shape == (1,)
