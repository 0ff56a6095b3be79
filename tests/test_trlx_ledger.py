"""Models into trlX and out of it, and the book that is kept of its run; none of this needs trlX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.checkpoint import StageDir
from rlhf.oversight import Oversight
from rlhf.stopping import StopSignal
from rlhf.telemetry import Metrics, Progress, read_metrics
from rlhf.trlx.export import read_trainer, trlx_copy, write_trainer
from rlhf.trlx.ledger import Ledger
from rlhf.trlx.reward import RewardFunction, Scored, trlx_prompts
from rlhf.watchdog import Watchdog
from tests.fakes import tiny_policy
from tests.tiny_run import EOS
from tests.trlx_parts import TOKENIZER, FakeTrainer, FixedScorer, config, row


def test_what_is_exported_goes_on_where_it_was(tmp_path: Path) -> None:
    trainer, other = FakeTrainer(seed=1), FakeTrainer(seed=2)
    trainer.step()
    trainer.kl_ctl.value, trainer.running_moments.mean = 0.25, torch.tensor(3.0)
    tmp_path.joinpath("saved").mkdir()
    write_trainer(tmp_path / "saved", trainer, TOKENIZER, {"iteration": 1})
    read_trainer(tmp_path / "saved", other, steps=1)
    assert other.kl_ctl.value == 0.25
    assert float(other.running_moments.mean) == 3.0
    for one in (trainer, other):
        one.step()
    trained = trainer.model.base_model.state_dict()
    for name, weight in other.model.base_model.state_dict().items():
        torch.testing.assert_close(weight, trained[name], atol=1e-7, rtol=0)
    assert other.opt.param_groups[0]["lr"] == pytest.approx(trainer.opt.param_groups[0]["lr"])


def test_auto_model_loads_the_trained_weights(tmp_path: Path) -> None:
    trainer = FakeTrainer(seed=1)
    trainer.step()
    write_trainer(tmp_path, trainer, TOKENIZER, {"iteration": 1})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = trainer.model.base_model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())


def test_trlx_gets_the_model_s_own_weights_and_an_empty_file_that_it_insists_on(tmp_path: Path) -> None:
    policy = tiny_policy(seed=3)
    policy.save_pretrained(tmp_path / "sft")
    (tmp_path / "final").symlink_to("sft")
    copy = trlx_copy(tmp_path / "final", tmp_path / "work" / "sft")
    assert torch.load(copy / "pytorch_model.bin", weights_only=True) == {}
    loaded = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in policy.state_dict().items())


STEP_VALUES = {
    "losses/total_loss": 0.0,
    "losses/policy_loss": 1.0,
    "losses/value_loss": 0.5,
    "ratio": torch.tensor(1.0),
    "policy/clipfrac": 0.0,
    "policy/approx_kl": 0.0,
    "values/clipfrac": 0.0,
    "learning_rate_group_0": 1e-3,
}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """At the beginning of three iterations of two chunks and two optimiser steps."""
    stage = StageDir(tmp_path / "run", "ppo")
    stage.path.mkdir(parents=True)
    function = RewardFunction([row()], ppo=config().ppo, tokenizer=TOKENIZER, scorer=FixedScorer())
    with (
        Metrics(stage, tensorboard=False) as metrics,
        Progress(stage, 3, "iterations") as progress,
        Watchdog(60) as watchdog,
    ):
        book = Ledger(config(), stage, function, TOKENIZER, metrics, progress, Oversight(StopSignal(), watchdog))
        book.begin(FakeTrainer(seed=1))
        yield book


def tell_rollouts(ledger: Ledger) -> None:
    """Two responses, of which one ends, as trlX tells of them: times are means over the chunks."""
    text = trlx_prompts([row()], TOKENIZER)[0]["prompt"]
    ledger.reward_function([], [text, text], [f"cat{EOS}", "cat"], tokenizer=None, post_id=[row().id] * 2)
    times = {"time/rollout_generate": 1.0, "time/rollout_score": 0.5, "time/rollout_time": 2.0}
    ledger.log({"rollout_scores/mean": 0.25, "policy/sqrt_kl": 0.2, "kl_ctl_value": 0.1} | times, step=0)


def test_trlx_s_numbers_get_our_names(ledger: Ledger) -> None:
    tell_rollouts(ledger)
    ledger.log(STEP_VALUES, step=1)
    ledger.log(STEP_VALUES | {"losses/policy_loss": 3.0}, step=2)
    ledger.end_iteration()
    [line] = read_metrics(ledger.stage.path / "metrics.jsonl")
    expected = {
        "step": 1,
        "ppo/reward": 0.25,
        "ppo/score": 0.205,  # of 21 and 20 tokens
        "ppo/kl": 0.04,
        "ppo/response_tokens": 3.5,
        "ppo/ended": 0.5,
        "ppo/policy_loss": 2.0,
        "time/rollout_seconds": 2.0,
        "time/score_seconds": 1.0,
        "time/experience_seconds": 1.0,
    }
    assert {key: line[key] for key in expected} == pytest.approx(expected)
    assert ledger.stage.steps() == []  # ppo.save_every_iterations is 2, and nothing held out was looked at


def test_the_best_within_the_budget_and_the_last_are_saved(ledger: Ledger) -> None:
    good = [Scored(row(), [1, 2], "a cat", 0.5)]
    for kl, number in ((0.0, 1), (99.0, 2), (0.0, 3)):
        tell_rollouts(ledger)
        ledger.held_out(good if number < 3 else [replace(good[0], score=0.4)], kl)
        ledger.log(STEP_VALUES, step=2 * number)
        if number < 3:
            ledger.end_iteration()
    ledger.close()
    assert [step for step, _ in ledger.stage.steps()] == [1, 2, 3]
    assert (ledger.stage.named("best"), ledger.stage.named("final")) == ("step-00000001", "step-00000003")
    assert [line["ppo/eval_reward"] for line in read_metrics(ledger.stage.path / "metrics.jsonl")] == pytest.approx(
        [0.45, 0.45, 0.35]
    )


def test_an_iteration_in_hand_is_ended_early(ledger: Ledger) -> None:
    ledger.leave()
    assert ledger.stage.steps() == []
    tell_rollouts(ledger)
    ledger.log(STEP_VALUES, step=1)
    ledger.leave()
    [(step, directory)] = ledger.stage.steps()
    other = replace(ledger, saved=directory, iteration=0, trainer=None)
    other.begin(FakeTrainer(seed=2))
    assert (step, other.iteration) == (1, 1)
