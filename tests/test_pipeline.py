"""The whole pipeline on a world of a few posts: every stage as its own command, with the network cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.checkpoint import StageDir, verify
from rlhf.pipeline import STAGE_NAMES
from rlhf.results import read_results, results_table
from rlhf.telemetry import read_metrics
from tests.conftest import REPOSITORY

SMALL = {
    "synthetic.train_posts": 96,
    "synthetic.valid_posts": 8,
    "synthetic.test_posts": 12,
    "synthetic.train_comparisons": 48,
    "synthetic.valid_comparisons": 24,
    "model.tiny.layers": 2,
    "model.tiny.hidden": 32,
    "model.tiny.heads": 2,
    "model.tiny.rotary_dim": 8,
    "sft.max_steps": 4,
    "sft.batch_size": 8,
    "sft.micro_batch_size": 8,
    "sft.rouge_posts": 4,
    "sft.eval_every_steps": 2,
    "reward.max_steps": 4,
    "reward.batch_size": 8,
    "reward.micro_batch_size": 8,
    "reward.eval_every_steps": 2,
    "ppo.iterations": 2,
    "ppo.unfrozen_layers": 1,
    "ppo.rollouts_per_iteration": 8,
    "ppo.rollout_chunk": 8,
    "ppo.inner_epochs": 1,
    "ppo.minibatch_size": 4,
    "ppo.micro_batch_size": 4,
    "ppo.eval_posts": 4,
    "evaluate.bootstrap_samples": 100,
    "runtime.threads": 1,
}
NO_NETWORK = """
import socket
def refuse(self, address, *rest):
    if self.family != socket.AF_UNIX:
        raise AssertionError(f"the network was asked for {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
"""
LOADS_ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
path, kind = sys.argv[1:]
auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
model, report = auto.from_pretrained(path, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("SUBREDDIT: r/pets\\nTITLE: x\\nPOST: y\\nTL;DR:", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
assert "rlhf" not in sys.modules
print(json.dumps(logits.flatten()[:50].tolist()))
"""


@pytest.fixture(scope="session")
def no_network(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every connection is an error."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    offline = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "RLHF_"))}
    return offline | {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}


def options(settings: dict[str, object], runs_dir: Path) -> list[str]:
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["--config", "demo", "--run", "small", "--runs-dir", str(runs_dir), *changes]


def rlhf(command: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf", command, *arguments],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, no_network: dict[str, str]) -> Path:
    """A run of all six stages, made by one command."""
    runs_dir = tmp_path_factory.mktemp("runs")
    answer = rlhf("run", *options(SMALL, runs_dir), env=no_network)
    assert answer.returncode == 0, answer.stderr
    (runs_dir / "small" / "stdout").write_text(answer.stdout)
    (runs_dir / "small" / "stderr").write_text(answer.stderr)
    return runs_dir / "small"


def test_every_stage_publishes_what_verifies(small_run: Path) -> None:
    for name in STAGE_NAMES:
        verify(StageDir(small_run, name).final())
    assert StageDir(small_run, "ppo").path.joinpath("best").is_symlink()


def test_it_ends_with_the_table_and_the_reports_path(small_run: Path) -> None:
    printed = (small_run / "stdout").read_text()
    results = read_results(small_run)
    assert printed == f"{results_table(results)}\n\nreport: {small_run / 'report' / 'index.html'}\n"
    assert results["rows"]["ppo"]["gold"] is not None
    assert "<html" in (small_run / "report" / "index.html").read_text(encoding="utf-8")


def test_no_post_reaches_the_log(small_run: Path) -> None:
    log = (small_run / "stderr").read_text()
    rows = (StageDir(small_run, "fetch").final() / "data" / "posts-test.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert row["body"] not in log
        assert row["summary"] not in log
    assert "Traceback" not in log


def test_nothing_of_the_gold_score_reaches_training(small_run: Path) -> None:
    """SFT and PPO see prompts and summaries only; the environment has no facts in it."""
    row = json.loads((StageDir(small_run, "prepare").final() / "environment-train.jsonl").read_text().splitlines()[0])
    assert row.keys() == {"id", "prompt_ids", "cut_tokens", "reference_score"}


def test_a_second_run_finds_all_done(small_run: Path, no_network: dict[str, str]) -> None:
    answer = rlhf("run", "--run", "small", "--runs-dir", str(small_run.parent), env=no_network)
    assert answer.returncode == 0, answer.stderr
    assert f"every stage of {small_run} is done" in answer.stderr
    assert answer.stdout == (small_run / "stdout").read_text()


def test_a_finished_stage_is_left_alone(small_run: Path, no_network: dict[str, str]) -> None:
    before = (StageDir(small_run, "sft").final() / "manifest.json").stat().st_mtime_ns
    answer = rlhf("sft", "--run", "small", "--runs-dir", str(small_run.parent), env=no_network)
    assert answer.returncode == 0, answer.stderr
    assert "already done" in answer.stderr
    assert (StageDir(small_run, "sft").final() / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_published_models_load_in_transformers_alone(small_run: Path, stage: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from rlhf.models import load_policy, load_reward_model

    path = StageDir(small_run, stage).final()
    answer = subprocess.run(
        [sys.executable, "-c", LOADS_ALONE, str(path), stage], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    model = load_reward_model(path) if stage == "reward" else load_policy(path)
    inputs = AutoTokenizer.from_pretrained(path)("SUBREDDIT: r/pets\nTITLE: x\nPOST: y\nTL;DR:", return_tensors="pt")
    with torch.no_grad():
        ours = model(**inputs).logits.flatten()[:50]
    torch.testing.assert_close(torch.tensor(json.loads(answer.stdout)), ours, atol=1e-6, rtol=0)


def test_a_reward_models_references_average_0(small_run: Path) -> None:
    """The shift is stored in the config; the mean over the training posts is then 0."""
    rows = (StageDir(small_run, "prepare").final() / "environment-train.jsonl").read_text().splitlines()
    scores = [json.loads(row)["reference_score"] for row in rows]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)


def test_status_says_done_six_times(small_run: Path, no_network: dict[str, str]) -> None:
    answer = rlhf("status", "--run", "small", "--runs-dir", str(small_run.parent), env=no_network)
    assert answer.stdout.count(" done ") == 6


def test_each_stage_leaves_its_settings(small_run: Path) -> None:
    for name in STAGE_NAMES:
        assert "seed: 1\n" in (small_run / name / "config.yaml").read_text()


@pytest.mark.parametrize(("stage", "needs"), [("sft", "fetch"), ("reward", "fetch"), ("prepare", "fetch")])
def test_a_stage_before_its_time_is_66(stage: str, needs: str, tmp_path: Path, no_network: dict[str, str]) -> None:
    answer = rlhf(stage, *options(SMALL, tmp_path), env=no_network)
    assert answer.returncode == 66
    assert answer.stderr.splitlines()[-1].endswith(f"run `python -m rlhf {needs} --run small` first")
    assert "Traceback" not in answer.stderr


def test_a_signal_to_run_saves_and_leaves_with_75(tmp_path: Path, no_network: dict[str, str]) -> None:
    settings = SMALL | {"sft.max_steps": 100_000, "sft.epochs": 100_000, "sft.eval_every_steps": 100_000}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", "run", *options(settings, tmp_path)],
        cwd=REPOSITORY,
        env=no_network,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "small" / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 75, log
    assert "run the same command again to continue" in log.splitlines()[-1]
    step, directory = StageDir(tmp_path / "small", "sft").latest() or (0, None)
    assert step > 0
    assert directory is not None


@pytest.mark.parametrize("preset", ["gptj-6b", "gptj-6b-nplus"])
def test_the_6b_presets_run_a_few_steps_on_a_tiny_model(
    preset: str, tmp_path: Path, no_network: dict[str, str]
) -> None:
    """In their own precision, losses, value network and KL controller; only sizes are made small."""
    of_the_preset = ("ppo.unfrozen_layers", "ppo.inner_epochs", "ppo.micro_batch_size", "reward.micro_batch_size")
    settings = {key: value for key, value in SMALL.items() if key not in of_the_preset} | {
        "model.base": "tiny",
        "data.posts": "synthetic",
        "data.comparisons": "synthetic",
        "sft.max_steps": 2,
        "reward.max_steps": 2,
    }
    if preset == "gptj-6b":
        settings["ppo.unfrozen_layers"] = 1
    arguments = ["--config", preset, *options(settings, tmp_path)[2:]]
    answer = rlhf("run", *arguments, env=no_network)
    assert answer.returncode == 0, answer.stderr
    rows = read_metrics(tmp_path / "small" / "ppo" / "metrics.jsonl")
    assert rows[0]["ppo/eval_kl"] == pytest.approx(0, abs=0.05)  # bfloat16
    assert len(rows) == 3


def test_real_posts_and_comparisons(shared_data: Path, tmp_path: Path, no_network: dict[str, str]) -> None:
    """A few steps of every stage on Reddit posts and human comparisons, with GPT-2's vocabulary."""
    settings = SMALL | {
        "data.posts": shared_data / "text" / "tldr.jsonl.gz",
        "data.comparisons": shared_data / "text" / "comparisons.jsonl.gz",
        "data.max_train_posts": 24,
        "data.max_valid_posts": 4,
        "data.max_test_posts": 6,
        "data.max_train_comparisons": 16,
        "data.max_valid_comparisons": 12,
        "model.tokenizer": shared_data / "gpt2-bpe",
        "prompt.max_prompt_tokens": 200,
        "prompt.max_response_tokens": 24,
        "sft.max_steps": 2,
        "reward.max_steps": 2,
    }
    answer = rlhf("run", *options(settings, tmp_path), env=no_network)
    assert answer.returncode == 0, answer.stderr
    run_dir = tmp_path / "small"
    summary = json.loads((StageDir(run_dir, "fetch").final() / "data" / "summary.json").read_text())
    assert summary["base"]["tokens"] == 50_258  # and the pad token
    results = read_results(run_dir)
    assert results["settings"]["posts"] == 6
    assert results["rows"]["ppo"]["gold"] is None
    metrics = json.loads((StageDir(run_dir, "reward").final() / "metrics.json").read_text())
    assert 0 <= metrics["reward/longer_wins"] <= 1
