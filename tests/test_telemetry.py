"""Logs, progress and metrics."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.checkpoint import StageDir
from rlhf.errors import StorageError
from rlhf.telemetry import JsonFormatter, Metrics, Progress, Stopwatch, read_metrics
from tests.conftest import REPOSITORY


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> StageDir:
    return StageDir(tmp_path / "run", "ppo" if "logged" in request.node.name else "sft")


def test_metrics_are_one_object_a_line(stage: StageDir) -> None:
    metrics = Metrics(stage, tensorboard=False)
    metrics.log(1, {"ppo/kl": 0.5, "ppo/reward": float("nan")})
    metrics.close()
    (row,) = read_metrics(stage.path / "metrics.jsonl")
    assert (row["step"], row["ppo/kl"], row["ppo/reward"]) == (1, 0.5, None)


def test_a_continued_run_has_neither_gaps_nor_doubles(stage: StageDir) -> None:
    metrics = Metrics(stage, tensorboard=False)
    for step in range(1, 6):
        metrics.log(step, {"a": step})
    metrics.close()
    with (stage.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')  # a process killed while it wrote
    metrics = Metrics(stage, tensorboard=False, start_step=4)
    for step in range(4, 7):
        metrics.log(step, {"a": 10 * step})
    metrics.close()
    rows = read_metrics(stage.path / "metrics.jsonl")
    assert [(row["step"], row["a"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_disabled_metrics_and_progress_write_nothing(stage: StageDir) -> None:
    metrics = Metrics(stage, tensorboard=True, enabled=False)
    metrics.log(1, {"a": 1})
    metrics.close()
    with Progress(stage, 2, "steps", enabled=False) as progress:
        progress.update(1)
    assert not stage.path.exists()


def test_tensorboard_gets_the_same_numbers(stage: StageDir) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(stage, tensorboard=True)
    metrics.log(3, {"ppo/kl": 0.25})
    metrics.close()
    events = EventAccumulator(str(stage.path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("ppo/kl")
    assert (scalar.step, scalar.value) == (3, 0.25)


def test_progress_is_left_for_status(stage: StageDir) -> None:
    with Progress(stage, 10, "steps") as progress:
        assert json.loads((stage.path / "progress.json").read_text())["done"] == 0
        progress.update(4, loss=2.5)
    state = json.loads((stage.path / "progress.json").read_text())
    assert (state["stage"], state["done"], state["total"], state["shown"]) == ("sft", 4, 10, {"loss": 2.5})
    assert state["seconds_left"] >= 0


def test_the_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("score"):
            pass
    assert list(watch.seconds) == ["score"]
    assert watch.seconds["score"] > 0


def test_logs_are_json_away_from_a_terminal() -> None:
    code = (
        "import logging\nfrom rlhf.telemetry import configure_logging\nconfigure_logging()\n"
        "logging.getLogger('rlhf.x').info('saved step=%d', 4)\nlogging.getLogger('other').info('noise')"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (line,) = answer.stderr.splitlines()
    fact = json.loads(line)
    assert (fact["level"], fact["logger"], fact["message"]) == ("INFO", "rlhf.x", "saved step=4")


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        record = logging.LogRecord("rlhf", logging.ERROR, "f", 1, "failed", None, sys.exc_info())
    fact = json.loads(JsonFormatter().format(record))
    assert "ValueError: wrong" in fact["traceback"]


def test_lines_of_a_metrics_file_that_are_not_ours_are_passed_over(tmp_path: Path) -> None:
    text = '[1]\n{"step": "3"}\n{"a": 1}\n{"step": 2, "a": 5}\n\xff\xfe\n{"step": true}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2, "a": 5}]


def test_a_full_disk_is_one_line_and_what_was_written_stays(small_volume: Callable[[str], Path]) -> None:
    stage = StageDir(small_volume("64k") / "run", "sft")
    metrics = Metrics(stage, tensorboard=False)
    metrics.log(1, {"a": 1})
    (stage.path.parent / "ballast").write_bytes(bytes(45_000))
    with pytest.raises(StorageError, match="the volume is full"):
        for step in range(2, 2000):
            metrics.log(step, {"a": step})
    metrics.close()
    (stage.path.parent / "ballast").unlink()
    steps = [row["step"] for row in read_metrics(stage.path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    again = Metrics(stage, tensorboard=False, start_step=steps[-1])
    again.log(steps[-1], {"a": 0})
    again.close()
    assert [row["step"] for row in read_metrics(stage.path / "metrics.jsonl")] == steps


@pytest.mark.parametrize("text", ["", "not json\n"])
def test_unreadable_metrics_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_progress_is_logged_where_there_is_no_terminal(stage: StageDir, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, logger="rlhf.telemetry"),
        Progress(stage, 10, "iterations", done=2) as progress,
    ):
        progress.update(3, reward=0.41, kl=1.25)
        progress.update(4, reward=0.5, kl=1.5)  # too soon for a line of its own
    first, last = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(
        r"progress stage=ppo done=3 total=10 unit=iterations seconds_left=\S+ reward=0.41 kl=1.25", first
    )
    assert re.fullmatch(r"progress stage=ppo done=4 total=10 unit=iterations seconds_left=\S+ reward=0.5 kl=1.5", last)


def test_progress_of_other_processes_is_not_logged(stage: StageDir, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, logger="rlhf.telemetry"),
        Progress(stage, 10, "iterations", enabled=False) as progress,
    ):
        progress.update(3)
    assert caplog.records == []
