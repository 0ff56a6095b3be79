"""Stages that are killed at random moments and begun again make what an undisturbed run makes, bit for bit.

`make chaos` kills each dozens of times, also as processes begun anew and as one of two that share a stage.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.checkpoint import StageDir
from rlhf.telemetry import Progress
from tests.chaos.compare import differences, picture
from tests.chaos.crash import Tally, judge_start, judge_stop
from tests.conftest import REPOSITORY

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="stages are forked; run it on Linux or macOS")


@needs_fork
@pytest.mark.timeout(900)
def test_every_stage_killed_at_random_moments_ends_as_if_it_had_not_been() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--kills", "3", "--seed", "5"]
    ended = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = re.search(r"kills survived: (\d+), states lost: 0, wrong: 0", ended.stdout)
    assert last, ended.stdout
    assert int(last[1]) >= 6 * 3


def test_the_comparison_sees_a_weight_a_line_of_metrics_and_a_sample(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "one", "ppo")
    with stage.publish(1, final=True) as directory:
        (directory / "weights").write_bytes(b"1")
    (stage.path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "ppo/kl": 0.5, "time/train_seconds": 2.0}\n')
    stage.write_text("samples/step-00000001.jsonl", "a\n")
    wanted = picture(tmp_path / "one", "ppo")

    def changed(path: str, text: str) -> list[str]:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(tmp_path / "one", other, symlinks=True)
        (other / "ppo" / path).write_text(text)
        return differences(wanted, picture(other, "ppo"))

    metrics = '{"step": 1, "time": 9.0, "ppo/kl": %s, "time/train_seconds": 1.0}\n'
    assert changed("metrics.jsonl", metrics % 0.5) == []
    assert changed("metrics.jsonl", metrics % 0.25) == ["metrics.jsonl:0: differs"]
    assert changed("metrics.jsonl", "") == ["metrics.jsonl:0: missing"]
    assert changed("samples/step-00000001.jsonl", "b\n") == ["samples/step-00000001.jsonl: differs"]
    assert changed("samples/step-00000002.jsonl", "b\n") == ["samples/step-00000002.jsonl: new"]


def test_who_goes_on_from_an_older_step_has_lost_states(tmp_path: Path) -> None:
    tally = Tally("ppo")
    (tmp_path / "stage.found").write_text("ppo 5\nppo 5\n")
    judge_start(tmp_path / "place", 5, tally)
    assert (tally.lost, tally.wrong) == (0, [])
    judge_start(tmp_path / "place", 7, tally)
    assert tally.lost == 2
    assert len(tally.wrong) == 1


def test_who_stops_without_saving_has_lost_states(tmp_path: Path) -> None:
    tally, stage = Tally("ppo"), StageDir(tmp_path, "ppo")
    for step in (2, 3):
        with stage.publish(step) as directory:
            (directory / "weights").write_bytes(b"1")
        with Progress(stage, 10, "steps", done=3):
            pass
        judge_stop(tmp_path, 0.0, tally)
    assert tally.wrong == ["stopped at 3, but 2 is saved"]
    assert tally.lost == 1
