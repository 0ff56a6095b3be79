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

import pytest

from rlhf.checkpoint import StageDir, verify
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.launcher.rendezvous import free_port
from rlhf.pipeline import STAGES, run_stage
from rlhf.presets import load_config
from rlhf.runtime import StopSignal
from rlhf.telemetry import read_metrics
from rlhf.trainer import deepspeed_file
from tests.launching import Launcher, ended, facts, options, two_nodes
from tests.tiny_run import fetched_run, tiny_config


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


def test_a_stop_on_one_of_two_nodes_saves_and_stops_both(launcher: Launcher, tiny: Tiny) -> None:
    run_dir, named = tiny
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
    assert all(log.splitlines()[-1].startswith("rlhf: stopped on request; step ") for log in logs)
    assert not [fact for fact in facts(logs[1]) if fact.startswith(("saved", "progress"))], "node 0 alone writes"
    [saved] = [fact for fact in facts(logs[0]) if fact.startswith("saved")]
    step, directory = StageDir(run_dir, "sft").latest() or (0, run_dir)
    assert saved == f"saved stage=sft step={step} path={directory}"
    assert {path.name for path in directory.parent.iterdir()} == {
        "config.yaml", "latest", "metrics.jsonl", "progress.json", "trainer", directory.name
    }  # fmt: skip


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
    assert {path.name for path in (run_dir / stage).iterdir() if path.name.startswith(".")} == set()
    last = [fact for fact in facts(log) if fact.startswith("progress")][-1]
    done, total = (word.partition("=")[2] for word in last.split()[2:4])
    assert done == total
    assert sum(fact.startswith(f"progress stage={stage} done={done} ") for fact in facts(log)) == 1
    steps = [row["step"] for row in read_metrics(run_dir / stage / "metrics.jsonl")]
    assert steps == sorted(steps)


def test_two_processes_share_optimiser_state_by_the_shipped_deepspeed_settings(launcher: Launcher, tiny: Tiny) -> None:
    """ZeRO-2 on the CPU; there, and only there, DeepSpeed compiles an operator when it starts."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed compiles an operator for the CPU; install g++ and ninja")
    run_dir, named = tiny
    folder = run_dir.parent / "zero"
    shutil.copytree(run_dir / "fetch", folder / run_dir.name / "fetch", symlinks=True)
    changes = ("--runs-dir", str(folder), "--set", "sft.deepspeed=zero2", "--set", "sft.max_steps=3")
    process = launcher.start("sft", "--processes", "2", *named, *changes)
    _, log = process.communicate(timeout=180)
    assert process.returncode == 0, log
    stage = StageDir(folder / run_dir.name, "sft")
    verify(stage.final())
    shards = sorted(path.name for path in (stage.path / "step-00000002" / "global_step2").iterdir())
    assert shards[1:] == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]


@pytest.mark.parametrize(("name", "path"), [(None, None), (__file__, __file__)])
def test_deepspeed_settings_by_path(name: str | None, path: str | None) -> None:
    assert deepspeed_file(name, key="sft.deepspeed") == path


def test_shipped_deepspeed_settings() -> None:
    path = deepspeed_file("zero2", key="sft.deepspeed")
    assert path is not None
    settings = json.loads(Path(path).read_text())
    assert settings["zero_optimization"]["stage"] == 2
    assert "optimizer" not in settings, "DeepSpeed's own would want a compiler"
    with pytest.raises(ConfigError, match=r"sft\.deepspeed=zero9: there is no such file; .* one of zero2, or leave"):
        deepspeed_file("zero9", key="sft.deepspeed")


def test_only_the_first_process_touches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = tmp_path / "sft" / ".unfinished-00000004-of-the-first"
    unfinished.mkdir(parents=True)
    monkeypatch.setattr("rlhf.stages.sft.run", lambda *_: None)
    stage = next(one for one in STAGES if one.name == "sft")
    monkeypatch.setenv("RANK", "1")
    run_stage(stage, tiny_config(), tmp_path, StopSignal())
    assert [path.name for path in (tmp_path / "sft").iterdir()] == [unfinished.name]
    monkeypatch.setenv("RANK", "0")
    run_stage(stage, tiny_config(), tmp_path, StopSignal())
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["config.yaml"]


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
