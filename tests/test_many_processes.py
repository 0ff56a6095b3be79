"""Every stage that many processes may share, on two of them: of one node, of two, of two that a cable joins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.checkpoint import StageDir, verify
from rlhf.config import Config
from rlhf.deepspeed_settings import deepspeed_file, deepspeed_settings
from rlhf.errors import ConfigError
from rlhf.launcher.rendezvous import free_port
from rlhf.pipeline import STAGES
from rlhf.presets import load_config
from rlhf.running import run_stage
from rlhf.stopping import StopSignal
from rlhf.telemetry import read_metrics
from tests.launching import Launcher, ended, facts, options, two_nodes
from tests.tiny_run import fetched_run, tiny_config
from tests.training_runs import assert_same_run, lines


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with Launcher(tmp_path) as launcher:
        yield launcher


TRAINING = {"micro_batch_size": 2, "save_every_steps": 2, "eval_every_steps": 4}
PPO = {
    "iterations": 3,
    "unfrozen_layers": 1,
    "rollouts_per_iteration": 8,
    "rollout_chunk": 4,
    "inner_epochs": 1,
    "minibatch_size": 4,
    "micro_batch_size": 2,
    "eval_posts": 4,
    "eval_every_iterations": 1,
    "save_every_iterations": 1,
}


Tiny = tuple[Path, tuple[str, ...]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A fetched run, and the options that name it; SFT, reward and PPO follow test by test."""
    folder = tmp_path_factory.mktemp("shared")
    run_dir = fetched_run(folder)
    settings = tiny_config(sft=TRAINING, reward=TRAINING).model_dump()
    (folder / "tiny.yaml").write_text(Config.model_validate(settings | {"ppo": PPO}).to_yaml())
    return run_dir, ("--run", run_dir.name, "--runs-dir", str(folder), "--config", str(folder / "tiny.yaml"))


SLOW_TO_LEAVE = """
import rlhf.running
from contextlib import contextmanager
real = rlhf.running._writer
@contextmanager
def slow(*given):
    with real(*given) as directory:
        try:
            yield directory
        finally:
            if rank == 0:
                time.sleep(4)  # by then the other node has left, and node 0's launcher has passed that on
rlhf.running._writer = slow
return attempt(arguments)
"""


def test_a_stop_on_one_of_two_nodes_saves_and_stops_both(launcher: Launcher, tiny: Tiny) -> None:
    run_dir, named = tiny
    launcher.stage_is(SLOW_TO_LEAVE)
    port = free_port()
    endless = [f"sft.{key}=100000" for key in ("max_steps", "epochs", "eval_every_steps", "save_every_steps")]
    named += tuple(word for setting in endless for word in ("--set", setting))
    nodes = [launcher.start("sft", *named, **two_nodes(node, port)) for node in range(2)]
    deadline = time.monotonic() + 60
    while not read_metrics(run_dir / "sft" / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    nodes[1].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=90)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [75, 75], logs
    assert all(log.splitlines()[-1].startswith("rlhf: stopped on request; step ") for log in logs), logs
    assert not [fact for fact in facts(logs[1]) if fact.startswith(("saved", "progress"))], "node 0 alone writes"
    [saved] = [fact for fact in facts(logs[0]) if fact.startswith("saved")]
    step, directory = StageDir(run_dir, "sft").latest() or (0, run_dir)
    assert saved == f"saved stage=sft step={step} path={directory}"
    shown = {path.name for path in directory.parent.iterdir() if not path.name.startswith(".writer-")}
    assert shown == {"config.yaml", "latest", "metrics.jsonl", "progress.json", directory.name}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_processes_share_a_stage(stage: str, launcher: Launcher, tiny: Tiny) -> None:
    """From the first batch to the published model; one of them writes and logs. Each needs the one before."""
    run_dir, named = tiny
    shutil.rmtree(run_dir / stage, ignore_errors=True)  # of the test before
    if stage == "ppo":
        settings = load_config(named[-1])
        run_stage(next(one for one in STAGES if one.name == "prepare"), settings, run_dir, StopSignal())
    process = launcher.start(stage, "--processes", "2", *named)
    _, log = process.communicate(timeout=90)
    assert process.returncode == 0, log
    verify(StageDir(run_dir, stage).final())
    assert not list((run_dir / stage).rglob(".unfinished-*"))
    last = [fact for fact in facts(log) if fact.startswith("progress")][-1]
    done, total = (word.partition("=")[2] for word in last.split()[2:4])
    assert done == total
    assert sum(fact.startswith(f"progress stage={stage} done={done} ") for fact in facts(log)) == 1
    steps = [row["step"] for row in read_metrics(run_dir / stage / "metrics.jsonl")]
    assert steps == sorted(steps)


ONE_LOSS_IS_NAN = """
import math
import rlhf.stages.sft as sft
real, calls = sft.target_logprobs, []
def sick(policy, batch):
    calls.append(rank)
    return real(policy, batch) * (math.nan if calls == [1, 1, 1] else 1.0)
sft.target_logprobs = sick
options = rlhf.__main__.build_parser().parse_args(arguments)
return options.command(options), ""
"""


@pytest.mark.parametrize("strategy", [None, "zero2", "zero3"])
def test_a_bad_number_on_one_process_is_seen_by_all(launcher: Launcher, tiny: Tiny, strategy: str | None) -> None:
    stage, named = sft_of_its_own(tiny, f"sick-{strategy}")
    named += ("--set", f"sft.deepspeed={strategy}") if strategy else ()
    launcher.stage_is(ONE_LOSS_IS_NAN)
    compiled = stage.path / "compiled"
    launcher.environment["TORCH_EXTENSIONS_DIR"] = str(compiled)
    process = launcher.start("sft", "--processes", "2", *named, "--set", "sft.max_steps=4")
    _, log = process.communicate(timeout=90)
    assert process.returncode == 0, log
    assert not compiled.exists(), (
        "DeepSpeed compiles nothing: where a process is killed meanwhile, others wait for good"
    )
    [bad] = [json.loads(line) for line in (stage.path / "bad-batches.jsonl").read_text().splitlines()]
    assert (bad["step"], bad["reason"], len(set(bad["ids"]))) == (3, "the loss is nan", 4)
    # Warm-up over 2 steps, then the peak: step 4 is the third one taken.
    rates = {row["step"]: row["sft/learning_rate"] for row in lines(stage) if "sft/loss" in row}
    assert rates[4] == pytest.approx(3e-3)


LONG = ("--set", "sft.epochs=4", "--set", "runtime.log_every_steps=3", "--set", "runtime.lease_seconds=1")
"""28 steps, with lines that a stop falls between."""


@pytest.fixture(scope="module")
def left_alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> StageDir:
    """A long SFT on two processes."""
    with Launcher(tmp_path_factory.mktemp("launched")) as launcher:
        stage, named = sft_of_its_own(tiny, "alone")
        _, log = launcher.start("sft", "--processes", "2", *named).communicate(timeout=180)
    assert stage.is_final(), log
    return stage


def sft_of_its_own(tiny: Tiny, folder: str) -> tuple[StageDir, tuple[str, ...]]:
    """SFT of a new run of the same data, and its options."""
    run_dir, named = tiny
    runs_dir = run_dir.parent / folder
    shutil.copytree(run_dir / "fetch", runs_dir / run_dir.name / "fetch", symlinks=True)
    return StageDir(runs_dir / run_dir.name, "sft"), (*named, "--runs-dir", str(runs_dir), *LONG)


def test_a_killed_process_loses_nothing(launcher: Launcher, tiny: Tiny, left_alone: StageDir) -> None:
    stage, named = sft_of_its_own(tiny, "killed")
    kill_one_of(launcher.start("sft", "--processes", "2", *named), once=stage.path / "step-00000004")
    assert not stage.is_final()
    _, log = launcher.start("sft", "--processes", "2", *named).communicate(timeout=180)
    assert stage.is_final(), log
    assert_same_run(stage, left_alone)


def test_a_killed_process_of_those_that_share_the_weights_loses_nothing(
    launcher: Launcher, tiny: Tiny, left_alone: StageDir
) -> None:
    """ZeRO-3 on the CPU, where DeepSpeed compiles an operator when it starts; one process alone goes on by ZeRO-2."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed compiles an operator for the CPU; install g++ and ninja")
    stage, named = sft_of_its_own(tiny, "zero")
    shared = ("--processes", "2", *named, "--set", "sft.deepspeed=zero3")
    kill_one_of(launcher.start("sft", *shared), once=stage.path / "step-00000004")
    _, log = launcher.start("sft", *named, "--set", "sft.deepspeed=zero2").communicate(timeout=180)
    assert stage.is_final(), log
    verify(stage.final())
    assert not list(stage.path.rglob("*.pt")), "nothing is pickled"
    losses = [[row["sft/loss"] for row in lines(one) if "sft/loss" in row] for one in (stage, left_alone)]
    # Sums in another order: the last digits differ; moments that were lost would show in the third.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def kill_one_of(launched: subprocess.Popen[str], *, once: Path) -> None:
    """SIGKILL for the second process as soon as the directory is there; waits until all have ended."""
    deadline = time.monotonic() + 120
    while not once.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [child for child in psutil.Process(launched.pid).children(recursive=True) if "RANK" in child.environ()]
    next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()
    launched.communicate(timeout=90)
    assert launched.returncode not in (0, 75)


@pytest.mark.parametrize(("name", "path"), [(None, None), (__file__, __file__)])
def test_deepspeed_settings_by_path(name: str | None, path: str | None) -> None:
    assert deepspeed_file(name, key="sft.deepspeed") == path


@pytest.mark.parametrize("name", ["zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_shipped_deepspeed_settings(name: str) -> None:
    path = deepspeed_file(name, key="sft.deepspeed")
    assert path is not None
    settings = json.loads(Path(path).read_text())
    zero, offloaded = settings["zero_optimization"], name.endswith("-offload")
    assert f"zero{zero['stage']}" == name.removesuffix("-offload")
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (offloaded, offloaded and zero["stage"] == 3)
    assert settings.keys().isdisjoint({"optimizer", "bf16", "fp16"}), "the run's own settings say these"


def test_deepspeed_settings_that_are_not_there() -> None:
    shipped = "one of zero2, zero2-offload, zero3, zero3-offload, or leave it empty"
    with pytest.raises(ConfigError, match=rf"sft\.deepspeed=zero9: there is no such file; .* {shipped}"):
        deepspeed_file("zero9", key="sft.deepspeed")


def test_deepspeed_settings_are_filled_in_and_held_against_the_run(tmp_path: Path) -> None:
    def filled(text: str) -> dict[str, Any]:
        (tmp_path / "zero.json").write_text(text)
        return deepspeed_settings(
            str(tmp_path / "zero.json"),
            micro_batch_size=2,
            accumulation=3,
            processes=4,
            optimizer=tiny_config().sft.optimizer,
            precision="bfloat16",
        )

    settings = filled('{"zero_optimization": {"stage": 2}}')
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (False, False), "weights are float32"
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    settings = filled('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "bf16": {"enabled": true}}')
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (3, 1.0)
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (True, False), "as that file wants it"
    assert "torch_autocast" not in settings
    with pytest.raises(ConfigError, match=r'fp16\.enabled is True, but .* makes it False; write "auto"'):
        filled('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}')
    with pytest.raises(ConfigError, match=r'train_batch_size is 16, but .* makes it 24; write "auto"'):
        filled('{"zero_optimization": {"stage": 2}, "train_batch_size": 16}')
    with pytest.raises(ConfigError, match=r"remove 'optimizer'; the run's own"):
        filled('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}')
    with pytest.raises(ConfigError, match=r"zero\.json is not JSON"):
        filled("{")
    with pytest.raises(ConfigError, match=r"zero\.json holds no JSON object"):
        filled("[]")


def test_only_the_first_process_touches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = tmp_path / "sft" / ".unfinished-00000004-of-the-first"
    unfinished.mkdir(parents=True)
    monkeypatch.setattr("rlhf.stages.sft.run", lambda *_: None)
    monkeypatch.setattr("rlhf.running.from_first", lambda _: None)  # what the first one would tell
    stage = next(one for one in STAGES if one.name == "sft")
    monkeypatch.setenv("RANK", "1")
    run_stage(stage, tiny_config(), tmp_path, StopSignal())
    assert [path.name for path in (tmp_path / "sft").iterdir()] == [unfinished.name]
    monkeypatch.undo()
    monkeypatch.setattr("rlhf.stages.sft.run", lambda *_: None)
    run_stage(stage, tiny_config(), tmp_path, StopSignal())
    assert not unfinished.exists()
    assert (tmp_path / "sft" / "config.yaml").is_file()


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, Path]]]:
    """Two network namespaces that a virtual cable joins, each with a hosts file of its own; their names and files."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make network namespaces")
    names = [f"rlhf-{os.getpid()}-{node}" for node in range(2)]
    hosts = [Path("/etc/netns", name, "hosts") for name in names]
    made = subprocess.run(["ip", "netns", "add", names[0]], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot make network namespaces ({made.stderr.strip()}); run in a privileged container")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.199.7.{node + 1}/24", "dev", f"cable{node}")
            ip("-n", name, "link", "set", f"cable{node}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            hosts[node].parent.mkdir(parents=True)
            hosts[node].write_text(f"127.0.0.1 localhost\n10.199.7.{node + 1} {socket.gethostname()}\n")
        yield list(zip(names, hosts, strict=True))
    finally:
        for name, file in zip(names, hosts, strict=True):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(file.parent, ignore_errors=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


ADDS_UP = """
import torch
torch.distributed.init_process_group("gloo")
share = torch.tensor(float(rank + 1))
torch.distributed.all_reduce(share)
torch.distributed.destroy_process_group()
open(f"{folder}/sum-{rank}", "w").write(f"{share.item()} {os.environ['MASTER_ADDR']}")
return 0, ""
"""


def test_two_hosts_form_one_process_group(
    launcher: Launcher, tmp_path: Path, two_hosts: list[tuple[str, Path]]
) -> None:
    """Node 1 comes first, and node 0's name does not resolve before its pod is there."""
    launcher.stage_is(ADDS_UP)
    job = two_nodes(0, 29500) | {"RLHF_RENDEZVOUS": "rlhf-sft-0.rlhf-sft:29500"}
    nodes = []
    for node, (name, hosts) in reversed(list(enumerate(two_hosts))):
        within = ("ip", "netns", "exec", name)
        nodes.append(launcher.start("sft", *options(tmp_path), within=within, **job | {"RLHF_NODE_RANK": str(node)}))
        if node == 1:
            assert nodes[0].stderr is not None
            assert "waiting for node 0 at rlhf-sft-0.rlhf-sft:29500: " in nodes[0].stderr.readline()
            with hosts.open("a") as file:
                file.write("10.199.7.1 rlhf-sft-0.rlhf-sft\n")
    for process in nodes:
        code, lines = ended(process)
        assert code == 0, lines
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["3.0 10.199.7.1"] * 2
