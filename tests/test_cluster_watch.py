"""Waiting: each fact is told once, patience ends, Ctrl-C ends the watching only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.cluster.obstacles import Fact, deployment_facts, job_facts
from rlhf.cluster.snapshot import Snapshot
from rlhf.cluster.verdict import Verdict, job_verdict
from rlhf.cluster.watch import Patience, Subject, Watch
from rlhf.errors import ConflictError, PrerequisiteError, StopRequested, UnavailableError
from tests.cluster_objects import RUNNING, UNSCHEDULABLE, condition, ended, job, pod, seen, waiting

WAITS = seen(job(), pod(conditions=(UNSCHEDULABLE,)))
RUNS = seen(job(), pod(phase="Running", node="a", states={"stage": RUNNING}))
DONE = seen(job(condition("Complete")))


class Clock:
    """Ten seconds pass between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self) -> None:
        self.now += 10


def watch(
    *looks: Snapshot,
    patience: Patience = Patience(None),  # noqa: B008
    facts: Callable[[Snapshot], list[Fact]] = job_facts,
    verdict: Callable[[Snapshot], Verdict | None] = lambda snapshot: job_verdict(snapshot, "ppo"),
) -> tuple[Watch, list[str], Clock]:
    """A wait that sees these looks, the last one again and again."""
    told: list[str] = []
    clock, left = Clock(), list(looks)
    subject = Subject("rlhf-ppo", "make again", lambda: left.pop(0) if len(left) > 1 else left[0], facts, verdict)
    return Watch(subject, patience, told.append, clock=clock, pause=clock.pause), told, clock


def test_each_fact_is_told_once_and_again_when_it_changes() -> None:
    other = condition("PodScheduled", "Unschedulable", "0/4 nodes are available.", status="False")
    changed = seen(job(), pod(conditions=(other,)))
    waiting_for, told, _ = watch(WAITS, WAITS, changed, WAITS, changed, RUNS, RUNS, WAITS, RUNS, DONE)
    assert waiting_for.wait() == Verdict(0, "ppo is done")
    assert [line.partition(" (")[0] for line in told] == [
        "rlhf-ppo-0: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "rlhf-ppo-0: Unschedulable: 0/4 nodes are available.",
        "rlhf-ppo-0: runs on a",
    ]


def test_what_is_gone_in_a_moment_is_not_told() -> None:
    waiting_for, told, _ = watch(WAITS, RUNS, DONE)
    waiting_for.wait()
    assert told == ["rlhf-ppo-0: runs on a"]


def test_an_obstacle_that_stands_too_long_ends_the_wait_and_not_the_job() -> None:
    waiting_for, _, clock = watch(WAITS, patience=Patience(300))
    with pytest.raises(
        UnavailableError, match=r"Insufficient nvidia.com/gpu.*\[for 300 seconds; rlhf-ppo stays"
    ) as stuck:
        waiting_for.wait()
    assert (stuck.value.exit_code, clock.now) == (69, 300)


def test_an_obstacle_that_goes_away_starts_anew() -> None:
    waiting_for, _, clock = watch(*[WAITS] * 29, RUNS, WAITS, patience=Patience(300))
    with pytest.raises(UnavailableError):
        waiting_for.wait()
    assert clock.now == 300 + 300


def test_what_blocks_nothing_may_take_its_time() -> None:
    queued = seen(job(suspend=True))
    waiting_for, told, _ = watch(*[queued] * 500, DONE, patience=Patience(300))
    assert waiting_for.wait().exit_code == 0
    assert told == ["rlhf-ppo: is suspended"]


def test_time_is_up() -> None:
    waiting_for, _, clock = watch(RUNS, patience=Patience(None, deadline=60))
    with pytest.raises(
        UnavailableError, match=r"time is up \(--timeout\): rlhf-ppo goes on in the cluster; `make again`"
    ):
        waiting_for.wait()
    assert clock.now == 60
    waiting_for, _, _ = watch(WAITS, patience=Patience(None, deadline=60))
    with pytest.raises(UnavailableError, match=r"Insufficient nvidia.com/gpu.*\[for the time given with --timeout"):
        waiting_for.wait()


def test_a_verdict_counts_before_the_deadline() -> None:
    assert watch(DONE, patience=Patience(0, deadline=0))[0].wait().exit_code == 0


def test_ctrl_c_says_how_to_watch_again() -> None:
    def interrupt() -> Snapshot:
        raise KeyboardInterrupt

    waiting_for = Watch(
        Subject("rlhf-ppo", "make again", interrupt, job_facts, lambda snapshot: None), Patience(), print
    )
    with pytest.raises(StopRequested, match="rlhf-ppo goes on in the cluster; `make again` watches it again") as stop:
        waiting_for.wait()
    assert stop.value.exit_code == 75


def test_a_job_that_is_absent_deleted_or_replaced() -> None:
    with pytest.raises(PrerequisiteError, match="there is no rlhf-ppo in the namespace: deploy it first"):
        watch(Snapshot(None))[0].wait()
    with pytest.raises(UnavailableError, match="rlhf-ppo is gone: somebody deleted it"):
        watch(RUNS, Snapshot(None))[0].wait()
    other = job()
    other["metadata"]["uid"] = "another"
    with pytest.raises(ConflictError, match="somebody replaced rlhf-ppo; `make again` watches the new one"):
        watch(RUNS, seen(other))[0].wait()


def crashing(count: int, code: int = 66) -> Snapshot:
    state = {**waiting("CrashLoopBackOff"), "lastState": ended(code, "rlhf: no model"), "restartCount": count}
    owner = {"metadata": {"name": "rlhf-api", "uid": "d"}, "spec": {}, "status": {}}
    return seen(owner, pod(phase="Running", node="a", states={"stage": state}))


def service(*looks: Snapshot, patience: Patience) -> Watch:
    return watch(*looks, patience=patience, facts=deployment_facts, verdict=lambda snapshot: None)[0]


def test_a_crash_counts_only_when_it_happened_while_we_watched() -> None:
    verdict = service(*[crashing(4)] * 5, crashing(5), patience=Patience(300)).wait()
    assert verdict.exit_code == 66
    assert verdict.line.endswith("starts again and again (5 times); exit code 66: rlhf: no model")
    with pytest.raises(UnavailableError, match="no model") as stuck:
        service(crashing(4), patience=Patience(300)).wait()
    assert stuck.value.exit_code == 66


def test_a_crash_that_may_mend_itself_is_given_its_time() -> None:
    looks = [crashing(count, code=1) for count in range(10)]
    with pytest.raises(UnavailableError, match="for 300 seconds") as stuck:
        service(*looks, patience=Patience(300)).wait()
    assert stuck.value.exit_code == 1
