"""The reward model on a tiny run: what is published, what is measured, and that nothing depends on chance."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf.checkpoint import StageDir
from rlhf.data import Comparison, load_comparisons, load_examples
from rlhf.errors import DataError, DivergedError, StopRequested
from rlhf.models import load_reward_model
from rlhf.preference import Pairs, by_margin, preference_metrics
from rlhf.prompt import encode_prompt, encode_response
from rlhf.scoring import Scorer
from rlhf.stages import reward
from rlhf.telemetry import read_metrics
from tests.tiny_run import byte_tokenizer, comparisons, fetched_run, post, tiny_config
from tests.training_runs import StopAtLook, assert_same_run, run, sicken

SETTINGS = {"epochs": 3, "eval_every_steps": 8, "save_every_steps": 6}


def run_through_sft(runs_dir: Path) -> Path:
    run_dir = fetched_run(runs_dir)
    run("sft", tiny_config(sft={"max_steps": 2}), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run_dir = run_through_sft(tmp_path_factory.mktemp("finished"))
    run("reward", tiny_config(reward=SETTINGS), run_dir)
    return run_dir


def test_it_learns_what_the_judges_agree_on(finished):
    metrics = json.loads((finished / "reward" / "final" / "metrics.json").read_text())
    # Every fourth judge errs, so a model that sees through them is right on 9 of 12, and without noise on all.
    assert metrics["reward/noise_free_accuracy"] > 0.9
    assert metrics["reward/accuracy"] == pytest.approx(0.75, abs=0.1)
    assert metrics["reward/accuracy_low"] < metrics["reward/accuracy"] < metrics["reward/accuracy_high"]
    # The bad summary is the longer one: it wins only where the judge errs.
    assert metrics["reward/longer_wins"] == 0.25
    assert metrics["reward/noise_free_longer_wins"] == 0.0
    assert set(metrics["by_source"]) == {"judge-0", "judge-1"}
    assert [row["low"] for row in metrics["by_margin"]] == [0.0, 1.0, 2.0]
    assert sum(row["count"] for row in metrics["reliability"]) == metrics["reward/pairs"] == 12
    rows = read_metrics(finished / "reward" / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward/accuracy" in row] == [8, 16, 21]
    assert {"reward/loss", "reward/learning_rate", "reward/grad_norm"} <= rows[0].keys()


def test_references_average_zero_after_the_shift(finished):
    tokenizer = byte_tokenizer()
    sequences = [
        encode_prompt(tokenizer, example.post, max_tokens=96).ids
        + encode_response(tokenizer, example.summary, max_tokens=24)
        for example in load_examples(finished / "fetch" / "final" / "data", "train")
    ]
    model = load_reward_model(StageDir(finished, "reward").final())
    scores = Scorer(model, batch_tokens=512).score(sequences)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert model.config.score_shift != 0.0
    metrics = json.loads((finished / "reward" / "final" / "metrics.json").read_text())
    assert metrics["reward/score_mean"] == pytest.approx(model.config.score_shift)
    assert metrics["reward/score_std"] == pytest.approx(scores.std().item(), rel=1e-4)


def test_bottom_blocks_and_embeddings_stay_as_sft_left_them(finished):
    before = load_file(finished / "sft" / "final" / "model.safetensors")
    after = load_file(finished / "reward" / "final" / "model.safetensors")
    for name in before.keys() & after.keys():
        if name == "transformer.ln_f.bias":
            continue  # it adds the same to both scores, so that its gradient is nothing, or rounding
        frozen = name.startswith(("transformer.wte", "transformer.h.0."))
        assert torch.equal(before[name], after[name]) == frozen, name
    assert after["score.weight"].shape == (1, 32)


def test_final_loads_in_transformers_alone_and_gives_the_same_scores(finished):
    final = StageDir(finished, "reward").final()
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "batch = tokenizer(['TL;DR: a cat' + tokenizer.eos_token, 'dog'], padding=True, return_tensors='pt')\n"
        "logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits\n"
        "assert not any(name.split('.')[0] == 'rlhf' for name in sys.modules)\n"
        "print(model.config.prompt_version)\n"
        "print(*(logits.squeeze(1) - model.config.score_shift).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(final)], cwd="/", capture_output=True, text=True, check=True
    )
    version, theirs = done.stdout.splitlines()[-2:]
    assert version == "tldr-1"
    tokenizer = byte_tokenizer()
    sequences = [[*tokenizer("TL;DR: a cat").input_ids, tokenizer.eos_token_id], tokenizer("dog").input_ids]
    ours = Scorer(load_reward_model(final), batch_tokens=512).score(sequences)
    assert ours.tolist() == pytest.approx([float(x) for x in theirs.split()], abs=1e-4)


# 21 steps with evaluations of three batches after 8, 16 and 21, and then the references' scores.
@pytest.mark.parametrize(("look", "saved"), [(11, 8), (13, 9), (30, 21), (31, 21)])
def test_the_same_seed_and_a_stop_in_between_change_no_bit(tmp_path, finished, look, saved):
    run_dir = tmp_path / "tiny"
    for stage in ("fetch", "sft"):
        shutil.copytree(finished / stage, run_dir / stage, symlinks=True)
    with pytest.raises(StopRequested, match=f"step {saved} of 21 is saved"):
        run("reward", tiny_config(reward=SETTINGS), run_dir, StopAtLook(look))
    assert not StageDir(run_dir, "reward").is_final()
    assert_same_run(run("reward", tiny_config(reward=SETTINGS), run_dir), StageDir(finished, "reward"))


def test_pairs_of_a_bad_step_are_noted_by_post_and_pair(tmp_path, monkeypatch):
    run_dir = run_through_sft(tmp_path)
    sicken(monkeypatch, 2)
    stage = run("reward", tiny_config(reward={"max_steps": 3}), run_dir)
    [bad] = [json.loads(line) for line in (stage.path / "bad-batches.jsonl").read_text().splitlines()]
    assert (bad["step"], bad["reason"], len(set(bad["ids"]))) == (2, "the loss is nan", 4)
    rows = load_comparisons(run_dir / "fetch" / "final" / "data", "train")
    encoded = reward.encode_pairs(byte_tokenizer(), rows, tiny_config().prompt)
    assert set(bad["ids"]) <= {pair.id for _, pair in encoded}
    assert all(pair.id.startswith(f"{comparison.post.id}-") for comparison, pair in encoded)


def test_scores_that_are_not_finite_end_the_training(finished):
    model = load_reward_model(StageDir(finished, "reward").final())
    torch.nn.init.constant_(model.score.weight, float("nan"))
    reward.take_batches(model)
    rows = load_comparisons(finished / "fetch" / "final" / "data", "valid")
    held_out = reward.encode_pairs(byte_tokenizer(), rows, tiny_config().prompt)
    evaluation = reward.Evaluation(model, held_out, size=4)
    with pytest.raises(DivergedError, match="held-out scores are not finite"):
        evaluation(lambda: False)
    assert evaluation(lambda: True) is None


def test_the_divergent_loss_learns_too(tmp_path):
    run_dir = run_through_sft(tmp_path)
    config = tiny_config(reward={**SETTINGS, "loss": "divergent", "micro_batch_size": 2})
    run("reward", config, run_dir)
    metrics = json.loads((run_dir / "reward" / "final" / "metrics.json").read_text())
    assert metrics["reward/noise_free_accuracy"] > 0.9


def test_pairs_equal_once_cut_are_left_out_and_eos_stays_last():
    tokenizer = byte_tokenizer()
    same = Comparison(post(0), "a long summary, good", "a long summary, bad", "judge")
    settings = tiny_config(prompt={"max_response_tokens": 10}).prompt
    encoded = reward.encode_pairs(tokenizer, [same, *comparisons(0, 1)], settings)
    assert [comparison.source for comparison, _ in encoded] == ["judge-0"]
    assert encoded[0][1].rejected.tolist()[-1] == tokenizer.eos_token_id
    assert len(encoded[0][1].rejected) == 10
    with pytest.raises(DataError, match="none of 1 comparisons"):
        reward.encode_pairs(tokenizer, [same], settings)


def test_metrics_of_four_pairs_worked_out_by_hand():
    nan = float("nan")
    pairs = Pairs(
        chosen_tokens_N=np.array([9.0, 5.0, 7.0, 8.0]),
        rejected_tokens_N=np.array([5.0, 9.0, 7.0, 2.0]),
        sources=["b", "a", "a", "b"],
        margins_N=np.array([1.0, 2.0, nan, 2.0]),
        gold_chosen_N=np.array([1.0, 0.0, 2.0, nan]),
        gold_rejected_N=np.array([0.0, 1.0, 2.0, nan]),
    )
    metrics = preference_metrics(np.array([2.0, 1.0, 0.5, 3.0]), np.array([0.0, 1.5, 0.5, 1.0]), pairs)
    # Right, wrong, tied, right; the longer one: right, wrong, tied, right.
    assert metrics["accuracy"] == 0.625
    assert metrics["longer_wins"] == 0.625
    # Gold is known and no tie for the first two: it agrees with the judge on the first, not on the second.
    assert metrics["noise_free_pairs"] == 2
    assert metrics["noise_free_accuracy"] == 1.0
    assert metrics["noise_free_longer_wins"] == 1.0
    # -log sigmoid of 2, -0.5, 0 and 2: 0.126928, 0.974077, 0.693147, 0.126928.
    assert metrics["eval_loss"] == pytest.approx(0.480270, abs=1e-6)
    assert {source: row["accuracy"] for source, row in metrics["by_source"].items()} == {"a": 0.25, "b": 1.0}
    assert [(row["low"], row["pairs"], row["accuracy"]) for row in metrics["by_margin"]] == [
        (1.0, 1, 1.0),
        (2.0, 2, 0.5),
    ]
    # Confidences 0.880797 (twice), 0.622459 and 0.5 against 1, 0 and 0.5.
    assert metrics["ece"] == pytest.approx((2 * 0.119203 + 0.622459 + 0) / 4, abs=1e-6)


def test_many_margins_fall_into_bins_of_equally_many_pairs():
    right_N = np.ones(20)
    rows = by_margin(right_N, right_N, np.arange(20.0))
    assert [row["pairs"] for row in rows] == [5, 5, 5, 5]
