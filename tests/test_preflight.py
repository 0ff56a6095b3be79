"""`rlhf check`: what is missing is said within seconds, in one line, with the code of the stage itself."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlhf.__main__ import main
from rlhf.checkpoint import StageDir
from rlhf.gpus import Gpus
from rlhf.pipeline import STAGE_NAMES, STAGES
from rlhf.presets import load_config
from tests.conftest import REPOSITORY

Run = tuple[Path, pytest.CaptureFixture[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """An empty volume, and a log that Kubernetes would read."""
    for name in [name for name in os.environ if name.startswith(("RLHF_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "termination-log").write_text("")
    monkeypatch.setattr("rlhf.console.TERMINATION_LOG", tmp_path / "termination-log")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs", capsys


def finish(runs_dir: Path, *stages: str) -> None:
    for stage in stages:
        with StageDir(runs_dir / "first", stage).publish(7, final=True) as directory:
            (directory / "weights").write_text("weights")


def check(run: Run, stage: str, *arguments: str) -> tuple[int, list[str], str]:
    """The exit code, the lines of what was found, and the one line of what is wrong."""
    runs_dir, capsys = run
    common = ("--run", "first", "--runs-dir", str(runs_dir), "--config", "demo")
    capsys.readouterr()  # what publishing logged, where another test has set the log going
    code = main(["check", stage, *common, *arguments])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == (1 if code else 0)
    assert (runs_dir.parent / "termination-log").read_text() == captured.err.strip()
    return code, captured.out.splitlines(), captured.err.strip()


def test_all_that_a_stage_needs(run: Run) -> None:
    finish(run[0], "sft", "reward", "prepare")
    code, found, _ = check(run, "ppo")
    assert code == 0
    assert [line.partition(":")[0] for line in found] == ["settings", "sft", "reward", "prepare", "volume", "GPUs"]
    assert found[1] == f"sft: finished, {run[0] / 'first' / 'sft' / 'step-00000007'}"
    assert sorted(path.name for path in (run[0] / "first").iterdir()) == ["prepare", "reward", "sft"]


def test_it_answers_within_seconds_because_torch_is_not_imported(run: Run) -> None:
    code = "import sys; from rlhf.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "check", "fetch", "--runs-dir", str(run[0])]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "GPUs: none to be used" in answer.stdout


def test_a_missing_stage_names_its_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    final = run[0] / "first" / "sft" / "final"
    code, _, line = check(run, "ppo")
    assert code == 66
    assert line == f"rlhf: ppo needs sft: {final} does not exist; run `python -m rlhf sft --run first` first"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert check(run, "ppo")[2] == f"rlhf: ppo needs sft: {final} does not exist; run `make deploy-sft` first"


def test_what_each_stage_reads_is_what_its_program_opens() -> None:
    for stage in STAGES:
        names = [f"stages/{stage.name}.py"] + (["ppo_setup.py"] if stage.name == "ppo" else [])
        opened: set[str] = set()
        for name in names:
            for node in ast.walk(ast.parse((REPOSITORY / "rlhf" / name).read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "StageDir":
                    opened |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
                if isinstance(node, ast.comprehension) and isinstance(node.iter, ast.Tuple):
                    opened |= {item.value for item in node.iter.elts if isinstance(item, ast.Constant)} & set(
                        STAGE_NAMES
                    )
        assert opened - {stage.name} == set(stage.reads), stage.name


def test_damage_is_found_by_size_without_reading(run: Run) -> None:
    finish(run[0], "fetch")
    weights = StageDir(run[0] / "first", "fetch").final() / "weights"
    weights.write_text("WEIGHTS")  # of the same size: the stage itself will find it
    assert check(run, "sft")[0] == 0
    weights.write_text("cut")
    code, _, line = check(run, "sft")
    assert code == 66
    assert "weights has 3 bytes instead of 7; run `python -m rlhf verify first --repair`" in line


def test_wrong_settings(run: Run) -> None:
    assert check(run, "sft", "--set", "sft.epoch=1")[0] == 78
    finish(run[0], "fetch")
    settings = load_config("demo", ["seed=2"]).to_yaml()
    (run[0] / "first" / "fetch" / "config.yaml").write_text(settings)
    code, _, line = check(run, "sft", "--config", "demo")
    assert code == 78
    assert "stage fetch of run 'first' began with other settings: seed was 2 and is 1 now; go back" in line


def test_batches_that_do_not_divide_among_all_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_NODES", "3")
    monkeypatch.setenv("RLHF_GPUS", "8")
    code, found, line = check(run, "ppo")
    assert (code, found) == (78, [])
    assert "does not divide among 24 processes" in line


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (("ppo.reward_placement=remote",), "needs ppo.remote.url"),
        (("ppo.reward_placement=dedicated", "runtime.device=cpu"), "the policy is on the CPU"),
        (("ppo.engine=trlx", "ppo.deepspeed=zero2"), "ppo.deepspeed=zero2 has no counterpart in trlX"),
    ],
)
def test_what_ppo_cannot_be_given(changes: tuple[str, ...], complaint: str, run: Run) -> None:
    code, _, line = check(run, "ppo", *(word for change in changes for word in ("--set", change)))
    assert code == 78
    assert complaint in line


def test_a_volume_without_symbolic_links(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    code, _, line = check(run, "fetch")
    assert code == 74
    assert "takes no symbolic links (Operation not supported); use a volume that does: NFS" in line
    assert [path for path in run[0].rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("mode", "complaint"), [(0o755, "cannot be written: Permission denied"), (0o700, "cannot be read")]
)
def test_a_volume_that_belongs_to_another_user(mode: int, complaint: str) -> None:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become another user; run as root with util-linux installed")
    command = ["setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups", sys.executable, "-m", "rlhf"]
    with tempfile.TemporaryDirectory() as volume:  # pytest's own folders are for their owner alone
        os.chmod(volume, mode)
        command += ["check", "fetch", "--runs-dir", volume, "--config", "demo"]
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answer.returncode == 74, answer.stderr
    assert answer.stderr.startswith(f"rlhf: {volume} {complaint}; we are user 10001 group 10001, it belongs to 0:0")
    assert answer.stderr.endswith(f"with mode {mode:04o}; give the pod's fsGroup write access to it\n")


def test_gpus_that_are_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.preflight.needed_cuda", lambda: "13.0")
    monkeypatch.setattr("rlhf.launcher.layout.visible_gpus", lambda: Gpus(4, 13000, ""))
    code, _, line = check(run, "fetch", "--gpus", "8")
    assert (code, line) == (69, "rlhf: 8 GPUs asked for, 4 visible")


@pytest.mark.parametrize(("driver", "code"), [(12080, 69), (13000, 0), (13020, 0), (14000, 0)])
def test_a_driver_has_to_know_torchs_cuda(driver: int, code: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.preflight.needed_cuda", lambda: "13.0")
    for module in ("launcher.layout", "preflight"):
        monkeypatch.setattr(f"rlhf.{module}.visible_gpus", lambda: Gpus(8, driver, ""))
    monkeypatch.setenv("RLHF_GPUS", "8")
    ended, found, line = check(run, "fetch")
    assert ended == code
    if code:
        assert "this node's driver knows CUDA 12.8, but torch needs 13.0; update the driver" in line
    else:
        assert found[-1].startswith("GPUs: 8 visible")


def test_an_image_without_cuda(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.preflight.needed_cuda", lambda: None)
    code, _, line = check(run, "fetch", "--gpus", "8")
    assert code == 78
    assert "8 GPUs asked for, but this torch is built without CUDA; use the CUDA image" in line


def test_settings_that_want_a_gpu_where_none_is_asked_for(run: Run) -> None:
    code, _, line = check(run, "fetch", "--set", "runtime.device=cuda")
    assert code == 78
    assert "runtime.device=cuda, but no GPU is asked for" in line
