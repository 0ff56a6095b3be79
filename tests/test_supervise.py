"""What a node's processes left, and did not leave, becomes one outcome."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.launcher.agent import REPORT, Order
from rlhf.launcher.outcome import Outcome, leave
from rlhf.launcher.supervise import Watch, conclude


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    """Two processes whose agent has ended with 1."""
    agent = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    agent.wait()
    order = Order(
        folder=str(tmp_path),
        nodes=2,
        node_rank=0,
        processes=2,
        address="10.0.0.1",
        port=1,
        meeting="one",
        join_within=60,
        stop_within=135,
        launcher=1,
    )
    return Watch(order, agent)


def report(watch: Watch, **told: Any) -> None:
    (watch.folder / REPORT).write_text(json.dumps(told))


def begun(watch: Watch) -> None:
    for rank in range(2):
        (watch.folder / f"begun-{rank}").touch()


def test_processes_that_never_began(watch: Watch) -> None:
    assert watch.outcome().line == "the processes did not come together: torchrun's agent ended with 1"
    report(watch, error="timed out after 600 s waiting for clients")
    outcome = watch.outcome()
    assert outcome.code == 69
    assert outcome.line == "the processes did not come together: timed out after 600 s waiting for clients"
    watch.asked_to_stop = True
    assert watch.outcome().code == 75


def test_one_that_hung_was_killed_because_of_the_other(watch: Watch) -> None:
    """torchrun kills those that have not ended 30 s after the first; they are not the cause."""
    begun(watch)
    leave(watch.folder, 1, 70, "OutOfMemoryError: CUDA out of memory")
    report(watch, failed={"1": [70, 100]})
    outcome = watch.outcome()
    assert (outcome.code, outcome.line) == (70, "OutOfMemoryError: CUDA out of memory")


def test_one_that_was_killed_is_the_cause_of_the_others_exception(watch: Watch) -> None:
    begun(watch)
    leave(watch.folder, 1, 70, "RuntimeError: Connection closed by peer")
    report(watch, failed={"0": [-signal.SIGKILL, 100], "1": [70, 100]})
    outcome = watch.outcome()
    assert outcome.code == 1
    assert outcome.line.startswith("process 0 was ended by SIGKILL")


def test_one_that_ended_itself_has_said_why(watch: Watch) -> None:
    begun(watch)
    (watch.folder / "words-0").write_text("rlhf: no step was done for 1800 s")
    leave(watch.folder, 1, 70, "RuntimeError: Connection closed by peer")
    report(watch, failed={"0": [1, 100], "1": [70, 100]})
    outcome = watch.outcome()
    assert (outcome.code, outcome.line) == (1, "no step was done for 1800 s")


def test_a_stop_that_one_process_did_not_manage(watch: Watch) -> None:
    begun(watch)
    leave(watch.folder, 0, 75, "stopped on request")
    report(watch, failed={})
    watch.asked_to_stop = True
    assert watch.outcome().code == 1
    assert watch.outcome().line == "not stopped within 135 s, so killed; what was saved before is still good"


def test_an_agent_that_was_killed(watch: Watch) -> None:
    begun(watch)
    leave(watch.folder, 0, 0, "")
    assert watch.outcome().line == "torchrun's agent was killed; what was saved before is still good"


def test_all_went_well(watch: Watch) -> None:
    begun(watch)
    for rank in range(2):
        leave(watch.folder, rank, 0, "")
    assert watch.outcome() == Outcome(0, "", watch.outcome().time)


def test_a_stop_for_a_peer_that_did_not_manage_has_the_peer_as_cause(watch: Watch) -> None:
    begun(watch)
    report(watch, failed={})
    watch.asked_to_stop = watch.for_peers = True
    elsewhere = Outcome(70, "node 1: OutOfMemoryError: CUDA out of memory", 1.0)
    ended = conclude(watch.outcome(), [elsewhere])
    assert ended.code == 75
    assert ended.line == f"{elsewhere.line}; stopped with it, run the same command again"


@pytest.mark.parametrize(
    ("here", "there", "code"),
    [
        ((0, 1.0), (1, 2.0), 0),  # done is done
        ((75, 1.0), (78, 2.0), 78),  # trying again is of no use on any node
        ((70, 2.0), (65, 3.0), 65),
        ((70, 2.0), (74, 3.0), 75),  # the cause was there: counted there
        ((70, 2.0), (70, 1.0), 75),
        ((70, 1.0), (70, 2.0), 70),  # the cause was here
        ((74, 1.0), (70, 0.5), 74),
        ((75, 2.0), (75, 1.0), 75),
    ],
)
def test_a_failure_counts_where_its_cause_is(here: tuple[int, float], there: tuple[int, float], code: int) -> None:
    ended = conclude(Outcome(here[0], "here", here[1]), [Outcome(there[0], "there", there[1])])
    assert ended.code == code
    assert ended.line.startswith("here" if code == here[0] else "there")
