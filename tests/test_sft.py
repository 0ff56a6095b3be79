"""SFT on a tiny run: what is published, and that seeds, stops and restarts change no bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.checkpoint import StageDir
from rlhf.collate import LengthGroupedSampler
from rlhf.config import SftConfig
from rlhf.errors import ConfigError, DivergedError
from rlhf.models import load_policy
from rlhf.stages import sft
from rlhf.telemetry import read_metrics
from rlhf.training_setup import plan_training
from tests.tiny_run import fetched_run, tiny_config
from tests.training_runs import assert_same_bits, assert_same_run, run, run_in_steps, weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose SFT went through two epochs, 14 steps, without a stop."""
    run_dir = fetched_run(tmp_path_factory.mktemp("finished"))
    torch.set_num_threads(1)
    run("sft", tiny_config(sft={"epochs": 2, "eval_every_steps": 5, "save_every_steps": 4}), run_dir)
    return run_dir


def test_it_learns_and_writes_its_metrics(finished):
    rows = read_metrics(finished / "sft" / "metrics.jsonl")
    losses = {row["step"]: row["sft/loss"] for row in rows if "sft/loss" in row}
    assert sorted(losses) == list(range(1, 15))
    # Random weights spread over 260 tokens: ln 260.
    assert losses[1] == pytest.approx(5.56, abs=0.1)
    assert losses[14] < 5
    evaluated = [row for row in rows if "sft/eval_loss" in row]
    assert [row["step"] for row in evaluated] == [5, 10, 14]
    assert {"sft/eval_rouge1", "sft/eval_rouge2", "sft/eval_rougeL"} <= evaluated[-1].keys()
    assert {"sft/learning_rate", "sft/grad_norm", "sft/tokens_per_second"} <= rows[0].keys()
    # Warm-up over 2 steps: 1/3 and 2/3 of the peak, then the peak.
    assert [row["sft/learning_rate"] for row in rows[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])


def test_final_loads_in_transformers_alone_and_gives_the_same_logits(finished):
    final = StageDir(finished, "sft").final()
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('TL;DR:', return_tensors='pt').input_ids\n"
        "assert not any(name.split('.')[0] == 'rlhf' for name in sys.modules)\n"
        "print(model.config.prompt_version, model.config.use_cache)\n"
        "print(*model(ids).logits[0, -1].double().tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(final)], cwd="/", capture_output=True, text=True, check=True
    )
    facts, logits = done.stdout.splitlines()[-2:]
    assert facts == "tldr-1 True"
    ids = AutoTokenizer.from_pretrained(final)("TL;DR:", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = load_policy(final)(ids).logits[0, -1].double()
    assert torch.allclose(ours, torch.tensor([float(x) for x in logits.split()], dtype=torch.float64), atol=1e-6)


def test_final_holds_its_numbers_and_nothing_pickled(finished):
    final = StageDir(finished, "sft").final()
    metrics = json.loads((final / "metrics.json").read_text())
    assert metrics["sft/eval_loss"] > 0
    assert 0 <= metrics["sft/eval_rougeL"] <= 1
    # keep_checkpoints is 2: the last checkpoint before the end, and the end, published once more without its training.
    assert [path.name for _, path in StageDir(finished, "sft").steps()] == ["step-00000012", "step-00000014.1"]
    assert final.resolve().name == "step-00000014.1"


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    finals = {}
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        run_dir = fetched_run(tmp_path / name)
        config = tiny_config(sft={"max_steps": 3}).model_copy(update={"seed": seed})
        run("sft", config, run_dir)
        finals[name] = StageDir(run_dir, "sft").final()
    assert_same_bits(finals["first"], finals["second"])
    assert not torch.equal(weights(finals["first"])["lm_head.weight"], weights(finals["other"])["lm_head.weight"])


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    finals, curves = [], []
    for name, micro in (("whole", 4), ("parts", 1)):
        run_dir = fetched_run(tmp_path / name)
        run("sft", tiny_config(sft={"max_steps": 2, "micro_batch_size": micro}), run_dir)
        finals.append(weights(StageDir(run_dir, "sft").final()))
        rows = read_metrics(run_dir / "sft" / "metrics.jsonl")
        # Adam and clipping hide a wrong scale from the weights; loss and gradient norm do not.
        curves.append([row[key] for row in rows for key in ("sft/loss", "sft/grad_norm") if key in row])
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    for name, value in finals[0].items():
        assert torch.allclose(value, finals[1][name], atol=2e-4), name


def test_each_epoch_has_an_order_of_its_own_also_after_a_restart(tmp_path, monkeypatch):
    epochs = []
    in_order = LengthGroupedSampler.__iter__

    def recorded(self):
        epochs.append(self.epoch)
        return in_order(self)

    monkeypatch.setattr(LengthGroupedSampler, "__iter__", recorded)
    config = tiny_config(sft={"epochs": 3, "max_steps": 15})
    whole = run("sft", config, fetched_run(tmp_path / "whole"))
    assert epochs == [0, 1, 2]
    epochs.clear()
    run_dir = fetched_run(tmp_path / "stopped")
    run_in_steps("sft", config, run_dir, monkeypatch)
    # Seven steps an epoch, each in a process of its own.
    assert epochs == [0] * 7 + [1] * 7 + [2]
    assert_same_run(StageDir(run_dir, "sft"), whole)


def test_bfloat16_and_gradient_checkpointing_train_float32_weights(tmp_path):
    run_dir = fetched_run(tmp_path)
    config = tiny_config(
        sft={"max_steps": 2, "gradient_checkpointing": True, "loss_on": "all"},
        runtime={"device": "cpu", "precision": "bfloat16", "tensorboard": False},
    )
    run("sft", config, run_dir)
    final = StageDir(run_dir, "sft").final()
    assert {value.dtype for value in weights(final).values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(final).config.use_cache


def test_steps_are_counted_over_epochs_and_accumulation():
    section = SftConfig(batch_size=8, micro_batch_size=2, epochs=2.5)
    plan = plan_training(section, name="sft", examples=42)
    # 42 examples: 21 micro-batches, 6 steps an epoch, 15 in 2.5 epochs.
    assert (plan.accumulation, plan.epoch_steps, plan.total_steps) == (4, 6, 15)
    assert plan_training(section.model_copy(update={"max_steps": 4}), name="sft", examples=42).total_steps == 4


def test_processes_share_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    section = SftConfig(batch_size=16, micro_batch_size=2)
    plan = plan_training(section, name="sft", examples=64)
    assert (plan.accumulation, plan.total_steps) == (2, 4)


def test_what_does_not_divide_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"sft\.batch_size=16 .* 3 process\(es\); try sft\.batch_size=12"):
        plan_training(SftConfig(batch_size=16, micro_batch_size=2), name="sft", examples=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"deepspeed": "/nowhere/zero2.json"}}, r"sft\.deepspeed=/nowhere/zero2\.json: there is no such"),
        ({"runtime": {"precision": "float16"}}, r"runtime\.precision=float16 trains on a GPU only"),
    ],
)
def test_a_setting_that_cannot_work_is_one_clear_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run("sft", tiny_config(**changes), fetched_run(tmp_path))


def test_a_learning_rate_that_destroys_the_model_ends_the_training(tmp_path):
    config = tiny_config(sft={"optimizer": {"learning_rate": 1e30}, "max_steps": 6})
    with pytest.raises(DivergedError, match=r"3 steps of sft in a row .* the loss is .* lower sft\.optimizer"):
        run("sft", config, fetched_run(tmp_path))
    stage = StageDir(tmp_path / "tiny", "sft")
    assert stage.steps() == []
    assert (stage.path / "bad-batches.jsonl").exists()


def test_a_model_that_is_not_finite_on_held_out_posts_is_not_published():
    with pytest.raises(DivergedError, match="the loss on held-out posts is not finite"):
        sft.loss_a_token(torch.tensor([[1.0, 2.0], [float("nan"), 2.0]]).numpy())
    assert sft.loss_a_token(torch.tensor([[1.0, 2.0], [5.0, 1.0]]).numpy()) == 2.0
