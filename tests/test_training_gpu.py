"""The training loop in half precision, where the scaler and the GPU's random generator are part of the state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf import training
from rlhf.checkpoint import StageDir
from rlhf.config import TinyModelConfig
from rlhf.errors import DivergedError, StopRequested
from rlhf.training_state import load_random_states, random_states
from tests.tiny_run import fetched_run, tiny_config
from tests.training_runs import StopAtLook, assert_same_run, lines, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run on a machine that has one")

SETTINGS = {"max_steps": 10, "epochs": 2, "eval_every_steps": 5, "save_every_steps": 4, "micro_batch_size": 2}


def config(precision: str, **sft: object) -> object:
    runtime = {"device": "cuda", "precision": precision, "log_every_steps": 4, "tensorboard": False}
    return tiny_config(sft={**SETTINGS, **sft}, runtime=runtime)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("look", [4, 8])
def test_a_stop_changes_nothing_on_a_gpu(tmp_path: Path, precision: str, look: int) -> None:
    whole = run("sft", config(precision), fetched_run(tmp_path / "whole"))
    run_dir = fetched_run(tmp_path / "stopped")
    with pytest.raises(StopRequested):
        run("sft", config(precision), run_dir, StopAtLook(look))
    _, saved = StageDir(run_dir, "sft").latest() or (0, run_dir)
    scaler = json.loads((saved / "training_state.json").read_text())["scaler"]
    assert (scaler is not None) == (precision == "float16")
    assert_same_run(run("sft", config(precision), run_dir), whole)


def overflowing(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Make the gradients of the first steps infinite, as a scale that is too high does."""
    build: Callable[..., training.Learner] = training.build_learner

    def built(*arguments: object, **named: object) -> training.Learner:
        learner = build(*arguments, **named)
        overflow = lambda gradient: gradient * float("inf") if learner.position.step < steps else gradient  # noqa: E731
        learner.network.lm_head.weight.register_hook(overflow)
        return learner

    monkeypatch.setattr(training, "build_learner", built)


def test_a_scaler_that_searches_its_scale_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflowing(monkeypatch, 5)
    run_dir = fetched_run(tmp_path)
    with pytest.raises(StopRequested):
        run("sft", config("float16"), run_dir, StopAtLook(8 + 6))
    _, saved = StageDir(run_dir, "sft").latest() or (0, run_dir)
    state = json.loads((saved / "training_state.json").read_text())
    # Five halvings; the learning rate has not moved with the five steps that were not taken.
    assert state["scaler"]["scale"] == 65536 / 2**5
    assert state["schedule_steps"] == state["position"]["step"] - 5
    assert not (run_dir / "sft" / "bad-batches.jsonl").exists()


def test_a_scale_that_collapses_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflowing(monkeypatch, 100)
    with pytest.raises(DivergedError, match=r"the scale of float16 fell to 0\.125"):
        run("sft", config("float16", max_steps=30, epochs=9), fetched_run(tmp_path))
    bad = [json.loads(line) for line in (tmp_path / "tiny" / "sft" / "bad-batches.jsonl").read_text().splitlines()]
    # 65536 halved 17 times is 0.5.
    assert [line["step"] for line in bad] == [17, 18, 19]


def test_the_gpus_random_numbers_go_on_where_they_were() -> None:
    states = random_states()
    expected = torch.rand(3, device="cuda").tolist()
    load_random_states(states)
    assert torch.rand(3, device="cuda").tolist() == expected


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero2-offload"])
def test_sharded_training_in_bfloat16_is_the_replicated_one(tmp_path: Path, strategy: str) -> None:
    """One GPU, blocks of GPT-J-6B's width, fused AdamW inside DeepSpeed's optimiser; losses as far as bfloat16 goes."""
    stages = []
    for name in ("", strategy):
        run_dir = fetched_run(
            tmp_path / (name or "ddp"), TinyModelConfig(layers=2, hidden=4096, heads=16, rotary_dim=64)
        )
        settings = config("bfloat16", max_steps=4, deepspeed=name or None)
        stages.append(run("sft", settings, run_dir))
    first, second = ([row["sft/loss"] for row in lines(stage) if "sft/loss" in row] for stage in stages)
    assert second == pytest.approx(first, rel=2e-2)
