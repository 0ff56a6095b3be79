"""The command line: quick help, exit codes, one clear line for every mistake."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.checkpoint import StageDir
from rlhf.lease import take_lease
from rlhf.pipeline import check_settings
from rlhf.presets import load_config
from rlhf.status import stage_status
from tests.conftest import REPOSITORY


def rlhf(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def fails_with(code: int, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command leaves on stderr."""
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_help_names_every_command() -> None:
    answer = rlhf("--help")
    assert answer.returncode == 0
    for command in ("fetch", "sft", "reward", "prepare", "ppo", "evaluate", "run", "status", "report", "config"):
        assert f"\n    {command} " in answer.stdout


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rlhf.__main__ import build_parser\nbuild_parser()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("pp",), "invalid choice: 'pp'"),
        (("ppo", "--sett", "a=1"), "unrecognized arguments"),
        (("run", "--from", "ppo", "--until", "sft"), "--from ppo comes after --until sft"),
        (("status", "--run", "../other"), "is not a run name"),
    ],
)
def test_a_wrong_command_line_is_64(arguments: tuple[str, ...], message: str, capsys) -> None:
    assert message in fails_with(64, capsys, *arguments)


@pytest.mark.parametrize("command", ["config", "fetch", "run"])
def test_a_wrong_setting_is_78(command: str, tmp_path: Path, capsys) -> None:
    arguments = (command, "--runs-dir", str(tmp_path), "--config", "demo", "--set", "ppo.iteratons=3")
    assert "unknown key ppo.iteratons; did you mean ppo.iterations?" in fails_with(78, capsys, *arguments)


@pytest.mark.parametrize("command", ["status", "report", "compare"])
def test_a_run_that_is_not_there_is_66(command: str, tmp_path: Path, capsys) -> None:
    arguments = [command, "--runs-dir", str(tmp_path), *(["none"] if command == "compare" else ["--run", "none"])]
    assert "none" in fails_with(66, capsys, *arguments)


def test_debug_adds_the_traceback(tmp_path: Path, capsys) -> None:
    assert main(["status", "--runs-dir", str(tmp_path), "--run", "none", "--debug"]) == 66
    assert "Traceback" in capsys.readouterr().err


def test_config_prints_what_a_run_would_use(capsys) -> None:
    assert main(["config", "--config", "gptj-6b", "--set", "ppo.iterations=3"]) == 0
    assert "  iterations: 3\n" in capsys.readouterr().out


def test_a_run_keeps_the_settings_it_began_with(tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "mine"
    (run_dir / "sft").mkdir(parents=True)
    (run_dir / "sft" / "config.yaml").write_text(load_config("demo", ["sft.epochs=2"]).to_yaml())
    arguments = ["config", "--runs-dir", str(tmp_path), "--run", "mine"]
    assert main(arguments) == 0
    assert "  epochs: 2.0\n" in capsys.readouterr().out


def test_settings_of_a_begun_stage_cannot_change(tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "mine"
    (run_dir / "sft").mkdir(parents=True)
    (run_dir / "sft" / "config.yaml").write_text(load_config("demo", ["sft.epochs=2"]).to_yaml())
    # What has published nothing yet may still be corrected.
    check_settings(load_config("demo", ["sft.epochs=3"]), run_dir)
    with StageDir(run_dir, "sft").publish(5):
        pass
    capsys.readouterr()  # what a test before may have made log there
    line = fails_with(
        78, capsys, "reward", "--runs-dir", str(tmp_path), "--run", "mine", "--config", "demo", "--set", "sft.epochs=3"
    )
    assert "stage sft of run 'mine' began with other settings: sft.epochs was 2.0 and is 3.0 now; go back" in line
    # What later stages read may still change, and so may how the machine is used.
    check_settings(load_config("demo", ["sft.epochs=2", "ppo.gamma=0.5", "runtime.threads=1"]), run_dir)


def test_status_tells_each_stage(tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "mine"
    with StageDir(run_dir, "fetch").publish(0, final=True):
        pass
    (run_dir / "sft").mkdir()
    progress = {"stage": "sft", "done": 5, "total": 20, "unit": "steps", "seconds_left": 75, "updated": time.time()}
    (run_dir / "sft" / "progress.json").write_text(json.dumps(progress))
    (run_dir / "reward").mkdir()
    (run_dir / "reward" / "progress.json").write_text(json.dumps(progress | {"stage": "reward", "updated": 0}))
    assert main(["status", "--runs-dir", str(tmp_path), "--run", "mine"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["fetch", "done", "0"]
    assert lines[2] == ["sft", "running", "sft: 5 of 20 steps, about 1 min 15 s left"]
    assert lines[3] == ["reward", "stopped", "reward: 5 of 20 steps"]
    assert lines[4] == ["prepare", "not", "begun"]


def test_a_stage_that_was_left_is_stopped_at_once(tmp_path: Path) -> None:
    progress = {"stage": "sft", "done": 5, "total": 20, "unit": "steps", "seconds_left": 75, "updated": time.time()}
    with take_lease(tmp_path / "mine" / "sft", seconds=60):
        (tmp_path / "mine" / "sft" / "progress.json").write_text(json.dumps(progress))
        assert stage_status(tmp_path / "mine", "sft")["state"] == "running"
    assert stage_status(tmp_path / "mine", "sft")["state"] == "stopped"


def test_the_termination_log_gets_the_line(tmp_path: Path, monkeypatch, capsys) -> None:
    log = tmp_path / "termination-log"
    log.write_text("")
    monkeypatch.setattr("rlhf.console.TERMINATION_LOG", log)
    line = fails_with(66, capsys, "status", "--runs-dir", str(tmp_path), "--run", "none")
    assert log.read_text() == line.strip()
