"""Nodes and processes from options and environment; what does not fit is refused."""

from __future__ import annotations

import os

import pytest

from rlhf.__main__ import build_parser
from rlhf.errors import ConfigError, RlhfError, UnavailableError, UsageError
from rlhf.gpus import Gpus
from rlhf.launcher.layout import Layout, layout

VARIABLES = (
    "RLHF_NODES",
    "RLHF_NODE_RANK",
    "JOB_COMPLETION_INDEX",
    "RLHF_GPUS",
    "RLHF_PROCESSES",
    "RLHF_RENDEZVOUS",
    "RLHF_RENDEZVOUS_TIMEOUT",
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with 8 GPUs and none of our variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    monkeypatch.setattr("rlhf.launcher.layout.visible_gpus", lambda: Gpus(8, 13000, ""))


def read(*arguments: str, device: str = "auto", parallel: bool = True, dedicated: bool = False) -> Layout:
    options = build_parser().parse_args(["launch", "ppo" if parallel else "fetch", *arguments])
    return layout(options, parallel=parallel, device=device, dedicated=dedicated)


def test_one_process_a_gpu() -> None:
    assert read() == Layout(nodes=1, node_rank=0, processes=8, rendezvous=None, timeout=600)
    assert read("--gpus", "2").processes == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "all"


def test_no_gpu_means_one_process_that_sees_none() -> None:
    assert read("--gpus", "0").processes == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_cpu_in_the_settings_needs_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.launcher.layout.visible_gpus", lambda: pytest.fail("the driver was asked"))
    assert read(device="cpu").processes == 1
    assert read("--processes", "3", device="cpu").processes == 3


def test_a_job_sets_variables_and_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RLHF_NODES": "4",
        "JOB_COMPLETION_INDEX": "2",
        "RLHF_GPUS": "8",
        "RLHF_RENDEZVOUS": "rlhf-sft-0.rlhf-sft:29500",
        "RLHF_RENDEZVOUS_TIMEOUT": "30",
    }.items():
        monkeypatch.setenv(name, value)
    host = ("rlhf-sft-0.rlhf-sft", 29500)
    assert read() == Layout(nodes=4, node_rank=2, processes=8, rendezvous=host, timeout=30)
    monkeypatch.setenv("RLHF_NODE_RANK", "3")
    assert read().node_rank == 3
    wanted = read("--node-rank", "1", "--nodes", "2", "--processes", "1", "--rendezvous", "[fd00::1]:29")
    assert wanted == Layout(nodes=2, node_rank=1, processes=1, rendezvous=("fd00::1", 29), timeout=30)


def test_a_stage_of_one_process_uses_one_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_GPUS", "8")
    assert read(parallel=False).processes == 1
    for arguments in (("--gpus", "2"), ("--processes", "2"), ("--nodes", "2")):
        with pytest.raises(UsageError, match="fetch runs in one process; leave out --nodes"):
            read(*arguments, parallel=False)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--nodes", "2"), UsageError, "several nodes need --rendezvous HOST:PORT"),
        (("--nodes", "2", "--rendezvous", "host"), UsageError, "--rendezvous host is not HOST:PORT"),
        (("--nodes", "2", "--rendezvous", "host:99999"), UsageError, "is not HOST:PORT"),
        (("--nodes", "2", "--node-rank", "2"), UsageError, "--node-rank 2 is not below --nodes 2"),
        (("--nodes", "0"), UsageError, "--nodes=0 is not a whole number of at least 1"),
        (("--gpus", "9"), UnavailableError, "9 GPUs asked for, 8 visible"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], kind: type[RlhfError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(*arguments)


def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_NODES", "two")
    with pytest.raises(UsageError, match="RLHF_NODES=two is not a whole number"):
        read()


def test_why_no_gpu_is_seen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.launcher.layout.visible_gpus", lambda: Gpus(0, 0, "there is no NVIDIA driver here"))
    with pytest.raises(UnavailableError, match="2 GPUs asked for, 0 visible: there is no NVIDIA driver here"):
        read("--gpus", "2")
    assert read().processes == 1


def test_settings_that_want_a_gpu_which_nobody_asks_for() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda, but no GPU is asked for"):
        read("--gpus", "0", device="cuda")


def test_a_reward_model_on_a_gpu_of_its_own_means_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("--gpus", "2", dedicated=True).processes == 1
    assert read(dedicated=True).processes == 1
    monkeypatch.setenv("RLHF_GPUS", "8")
    assert read(dedicated=True).processes == 1


@pytest.mark.parametrize(
    ("arguments", "device", "message"),
    [
        (("--processes", "2"), "auto", "2 processes would share the stage; use .*colocated, or one process"),
        (("--nodes", "2", "--rendezvous", "host:29"), "auto", "2 processes would share the stage"),
        (("--processes", "2"), "cpu", "2 processes would share the stage"),
        (("--gpus", "1"), "auto", "1 GPU is there; use 2 GPUs, or ppo.reward_placement=colocated"),
        (("--gpus", "0"), "auto", "the policy is on the CPU; use 2 GPUs"),
        ((), "cpu", "the policy is on the CPU; use 2 GPUs"),
    ],
)
def test_a_reward_model_on_a_gpu_of_its_own_needs_two(arguments: tuple[str, ...], device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"ppo\.reward_placement=dedicated .*{message}"):
        read(*arguments, device=device, dedicated=True)
