"""`rlhf launch` with real processes: exit codes, one line, signals, nodes.

Where the stage itself does not matter, the processes run a few lines in its place: torchrun's agent, the launcher and
all between them are real.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.checkpoint import StageDir
from rlhf.launcher.agent import Order
from rlhf.launcher.peers import Peers
from rlhf.launcher.rendezvous import free_port
from rlhf.launcher.supervise import supervise
from tests.conftest import REPOSITORY
from tests.launching import Launcher, ended, options, two_nodes


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with Launcher(tmp_path) as launcher:
        yield launcher


def test_the_first_failure_is_the_one_that_is_told(launcher: Launcher, tmp_path: Path) -> None:
    """Process 1 finds bad data; the others, whose connections break, say so in vain."""
    launcher.stage_is("""
        open(f"{folder}/environment-{rank}", "w").write(json.dumps(dict(os.environ)))
        open(f"{folder}/written-{rank}", "w").close()
        if rank == 1:
            wait_until(f"{folder}/written-0")
            wait_until(f"{folder}/written-2")
            open(f"{folder}/failed", "w").close()
            return 65, "posts.jsonl:7: row is broken"
        wait_until(f"{folder}/failed")
        return 70, "RuntimeError: Connection closed by peer"
    """)
    code, lines = launcher.run("sft", "--processes", "3", *options(tmp_path))
    assert (code, lines) == (65, ["rlhf: posts.jsonl:7: row is broken"])
    told = [json.loads((tmp_path / f"environment-{rank}").read_text()) for rank in range(3)]
    assert {one["WORLD_SIZE"] for one in told} == {"3"}
    assert {one["MASTER_ADDR"] for one in told} == {"127.0.0.1"}
    assert {one["OMP_NUM_THREADS"] for one in told} == {str(max(len(os.sched_getaffinity(0)) // 3, 1))}


def test_a_killed_process_is_told(launcher: Launcher, tmp_path: Path) -> None:
    launcher.stage_is("""
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return 70, "RuntimeError: Connection closed by peer"
    """)
    code, lines = launcher.run("sft", "--processes", "2", *options(tmp_path))
    assert code == 1
    assert lines == [
        "rlhf: process 0 was ended by SIGKILL, perhaps for want of memory; what was saved before is still good"
    ]


LISTENS = """
stopped = threading.Event()
count = []
signal.signal(signal.SIGTERM, lambda number, frame: (count.append(number), stopped.set()))
open(f"{folder}/listening-{rank}", "w").close()
stopped.wait(60)
if rank == 1:
    time.sleep(1)  # is still saving when the other has left
open(f"{folder}/signals-{rank}", "w").write(str(len(count)))
return 75, "stopped on request; run the same command again"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_once(number: signal.Signals, launcher: Launcher, tmp_path: Path) -> None:
    launcher.stage_is(LISTENS.replace("signal.SIGTERM", f"signal.{number.name}"))
    process = launcher.start("sft", "--processes", "2", *options(tmp_path))
    launcher.sees("listening-*", 2)
    for _ in range(3):
        process.send_signal(number)
    assert ended(process) == (75, ["rlhf: stopped on request; run the same command again"])
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_a_signal_before_a_stage_listens(launcher: Launcher, tmp_path: Path) -> None:
    """While the processes still import what they need there is nothing to save."""
    process = launcher.start("sft", "--processes", "2", *options(tmp_path))
    launcher.sees("rlhf-launch-*/begun-*")
    process.send_signal(signal.SIGTERM)
    code, lines = ended(process)
    assert code == 75
    # The other process may have been hit before it could listen at all, which is told in other words.
    assert lines[-1].endswith(
        ("run the same command again to continue", "before anything began; run the same command again")
    )


def test_a_signal_to_a_lone_process_before_its_stage_listens(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, time; os.mkdir(os.environ['SIGNS'] + '/importing'); time.sleep(60)")
    process = launcher.start("sft", *options(tmp_path), PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    launcher.sees("importing")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, ["rlhf: interrupted; run the same command again to continue"])


def test_who_does_not_stop_in_time_is_killed(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.stage_is("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(f"{folder}/listening-{rank}", "w").close()
        time.sleep(100)
    """)
    for name, value in launcher.environment.items():
        monkeypatch.setenv(name, value)
    order = Order(
        folder=str(tmp_path),
        nodes=1,
        node_rank=0,
        processes=2,
        address="127.0.0.1",
        port=free_port(),
        meeting="one",
        join_within=60,
        stop_within=1,
        launcher=os.getpid(),
    )

    def stop() -> None:
        launcher.sees("listening-*", 2)
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(stop)
        outcome = supervise(order, ["sft"], Peers({}))
        asked.result()
    assert outcome.code == 1
    assert outcome.line == "not stopped within 1 s, so killed; what was saved before is still good"


def test_nothing_outlives_a_killed_launcher(launcher: Launcher, tmp_path: Path) -> None:
    launcher.stage_is("""
        open(f"{folder}/pids-{rank}", "w").write(f"{os.getpid()} {os.getppid()}")
        open(f"{folder}/written-{rank}", "w").close()
        time.sleep(100)
    """)
    process = launcher.start("sft", "--processes", "2", *options(tmp_path))
    launcher.sees("written-*", 2)
    pids = {int(pid) for rank in range(2) for pid in (tmp_path / f"pids-{rank}").read_text().split()}
    process.kill()
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_failure_on_one_node_ends_the_other(launcher: Launcher, tmp_path: Path) -> None:
    """Node 0's process waits for ever, as in a collective whose peer has gone."""
    port = free_port()
    launcher.stage_is("""
        if rank == 1:
            wait_until(f"{folder}/waiting")
            return 78, "the loss is nan; lower the learning rate"
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
        open(f"{folder}/waiting", "w").close()
        stopped.wait(60)
        return 75, "stopped on request"
    """)
    nodes = [launcher.start("sft", *options(tmp_path), **two_nodes(node, port)) for node in range(2)]
    assert ended(nodes[1]) == (78, ["rlhf: the loss is nan; lower the learning rate"])
    assert ended(nodes[0]) == (78, ["rlhf: node 1: the loss is nan; lower the learning rate"])


def test_a_node_that_is_gone_ends_the_other(launcher: Launcher, tmp_path: Path) -> None:
    """It leaves with 75, which a Job does not count: the failure was the other's."""
    port = free_port()
    launcher.stage_is(LISTENS)
    nodes = [launcher.start("sft", *options(tmp_path), **two_nodes(node, port)) for node in range(2)]
    launcher.sees("listening-*", 2)
    nodes[0].kill()
    line = "node 0 is gone without a word; see what became of its pod; stopped with it, run the same command again"
    assert ended(nodes[1]) == (75, [f"rlhf: {line}"])


def test_a_broken_connection_has_its_cause_on_the_other_node(launcher: Launcher, tmp_path: Path) -> None:
    port = free_port()
    launcher.stage_is("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return 70, "RuntimeError: Connection closed by peer"
    """)
    nodes = [launcher.start("sft", *options(tmp_path), **two_nodes(node, port)) for node in range(2)]
    killed = "process 0 was ended by SIGKILL, perhaps for want of memory; what was saved before is still good"
    assert ended(nodes[1]) == (1, [f"rlhf: {killed}"])
    assert ended(nodes[0]) == (75, [f"rlhf: node 1: {killed}; stopped with it, run the same command again"])


def test_a_stop_while_waiting_for_others(launcher: Launcher, tmp_path: Path) -> None:
    port = free_port()
    for node in range(2):
        process = launcher.start("sft", *options(tmp_path), **two_nodes(node, port))
        assert process.stderr is not None
        assert "waiting for node" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (75, ["rlhf: interrupted; run the same command again to continue"])


def test_others_that_do_not_come(launcher: Launcher, tmp_path: Path) -> None:
    code, lines = launcher.run("sft", "--rendezvous-timeout", "1", *options(tmp_path), **two_nodes(0, free_port()))
    assert code == 69
    assert lines == ["rlhf: node 1 of 2 did not come within 1 s; see whether their pods run, and if not, why"]


def test_a_finished_stage_waits_for_nobody(launcher: Launcher, tmp_path: Path) -> None:
    with StageDir(tmp_path / "demo", "sft").publish(1, final=True):
        pass
    code, lines = launcher.run("sft", *options(tmp_path), **two_nodes(1, free_port()))
    assert (code, lines) == (0, [])


def test_a_finished_stage_that_is_damaged_is_not_done(launcher: Launcher, tmp_path: Path) -> None:
    with StageDir(tmp_path / "demo", "sft").publish(1, final=True) as directory:
        (directory / "weights").write_text("weights")
    (tmp_path / "demo" / "sft" / "final" / "weights").write_text("cut")
    code, lines = launcher.run("sft", "--rendezvous-timeout", "1", *options(tmp_path), **two_nodes(0, free_port()))
    assert code == 69
    assert "did not come within 1 s" in lines[-1]


def test_batches_are_looked_at_before_anything_starts(launcher: Launcher, tmp_path: Path) -> None:
    code, lines = launcher.run("ppo", "--processes", "7", *options(tmp_path))
    assert code == 78
    assert "does not divide among 7 processes" in lines[0]
    assert not (tmp_path / "demo").exists()
