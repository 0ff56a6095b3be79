"""Prepare and evaluate on two processes: the same files, byte for byte, as by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf.checkpoint import StageDir
from rlhf.data import write_jsonl
from rlhf.pipeline import STAGES
from rlhf.presets import load_config
from rlhf.running import run_stage
from rlhf.stages import prepare
from rlhf.stopping import StopSignal
from tests.fakes import tiny_policy, tiny_reward_model
from tests.launching import Launcher
from tests.served_run import publish_model
from tests.tiny_run import examples, fetched_run, tiny_config

SETTINGS = [
    "runtime.threads=1",
    "evaluate.batch_size=2",
    "evaluate.batch_tokens=200",
    "evaluate.bootstrap_samples=100",
    "evaluate.temperature=1.0",
]
CHUNK = 10
BOTH_STAGES = f"""
import rlhf.stages.prepare, rlhf.passes
from rlhf.running import run_stage
from rlhf.pipeline import STAGES
from rlhf.runtime import all_processes
from rlhf.stopping import StopSignal
rlhf.stages.prepare.CHUNK = {CHUNK}
for module in (rlhf.stages.prepare, rlhf.passes):
    def load(*given, real=module.load_reward_model, name=module.__name__, **options):
        open(f"{{folder}}/{{name}}-{{rank}}", "w").close()
        return real(*given, **options)
    module.load_reward_model = load
options = rlhf.__main__.build_parser().parse_args(arguments)
config = rlhf.__main__.read_config(options)
with all_processes(config.runtime):
    for stage in (one for one in STAGES if one.name in ("prepare", "evaluate")):
        run_stage(stage, config, options.runs_dir / options.run, StopSignal())
return 0, ""
"""
"""Both in one start of the processes, in small chunks, so that there are some for each; who scores leaves a sign."""


def trained_run(runs_dir: Path) -> Path:
    """A run up to PPO, with random weights and five test posts; prepare has not run."""
    run_dir = fetched_run(runs_dir)
    write_jsonl(run_dir / "fetch" / "final" / "data" / "posts-test.jsonl", [row.to_row() for row in examples(40, 45)])
    fetch = StageDir(run_dir, "fetch")
    with fetch.publish(1, final=True) as directory:
        (run_dir / "fetch" / "step-00000000" / "data").rename(directory / "data")
    publish_model(run_dir, "sft", tiny_policy(seed=1), step=1)
    publish_model(run_dir, "ppo", tiny_policy(seed=2), step=1)
    metrics = {"reward/accuracy": 0.75, "reward/longer_wins": 0.5}
    with StageDir(run_dir, "reward").publish(1, final=True) as directory:
        model = publish_model(runs_dir / "elsewhere", "reward", tiny_reward_model(), step=1)
        for path in model.iterdir():
            path.rename(directory / path.name)
        (directory / "metrics.json").write_text(json.dumps(metrics))
    return run_dir


def published(run_dir: Path) -> dict[str, bytes]:
    """What both stages have published, and the report without the time it was written."""
    found = {}
    for stage in ("prepare", "evaluate"):
        directory = StageDir(run_dir, stage).final()
        found |= {f"{stage}/{path.name}": path.read_bytes() for path in directory.iterdir()}
    html = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    return found | {"report": re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", html).encode()}


def test_two_processes_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_config().to_yaml())
    config = load_config(str(tmp_path / "tiny.yaml"), SETTINGS)
    monkeypatch.setattr(prepare, "CHUNK", CHUNK)
    alone, shared = trained_run(tmp_path / "alone"), trained_run(tmp_path / "shared")
    for stage in (one for one in STAGES if one.name in ("prepare", "evaluate")):
        run_stage(stage, config, alone, StopSignal())
    named = ("--run", shared.name, "--runs-dir", str(shared.parent), "--config", str(tmp_path / "tiny.yaml"))
    named += tuple(word for setting in SETTINGS for word in ("--set", setting))
    with Launcher(tmp_path) as launcher:
        launcher.stage_is(BOTH_STAGES)
        process = launcher.start("prepare", "--processes", "2", *named)
        _, log = process.communicate(timeout=90)
        assert process.returncode == 0, log
    assert published(shared) == published(alone)
    for module in ("rlhf.stages.prepare", "rlhf.passes"):
        assert [(tmp_path / f"{module}-{rank}").exists() for rank in range(2)] == [True, True]
    assert not list(shared.rglob("*.partial.jsonl"))
