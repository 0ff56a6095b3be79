"""Waiting for a stage or a service in the cluster, with or without its logs, and reading the logs alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from rlhf.cluster.api import ApiRefusal, Cluster
from rlhf.cluster.documents import SERVICES, workload_name
from rlhf.cluster.jobs import watch_command
from rlhf.cluster.obstacles import deployment_facts, job_facts
from rlhf.cluster.screen import Screen
from rlhf.cluster.snapshot import Snapshot, deployment_snapshot, job_snapshot, short_name
from rlhf.cluster.streams import LogFollower, print_log
from rlhf.cluster.verdict import Verdict, job_verdict, rollout_verdict
from rlhf.cluster.watch import Patience, Subject, Watch
from rlhf.errors import PrerequisiteError

LAST_LINES_SECONDS = 15.0


@dataclass(frozen=True)
class Waiting:
    """How to wait: with the logs, of what was written before only `tail` lines, and for how long."""

    follow: bool = False
    tail: int | None = None
    stuck_after_seconds: float | None = 300.0
    timeout_seconds: float | None = None

    def patience(self) -> Patience:
        """Patience from now on."""
        deadline = None if self.timeout_seconds is None else time.monotonic() + self.timeout_seconds
        return Patience(self.stuck_after_seconds, deadline)


def wait_for(
    cluster: Cluster, part: str, waiting: Waiting, screen: Screen, patience: Patience | None = None
) -> Verdict:
    """Wait for the verdict on a stage's Job or a service's rollout, telling what happens.

    Raises what `Watch.wait` raises.
    """
    return _watched(cluster, subject(cluster, part), waiting, screen, patience or waiting.patience())


def follow_logs(cluster: Cluster, part: str, waiting: Waiting, screen: Screen) -> Verdict:
    """Show the log of a stage until its verdict; that of a service until Ctrl-C."""
    what = subject(cluster, part)
    if part in SERVICES:
        what = replace(what, verdict=lambda snapshot: None)
    return _watched(cluster, what, waiting, screen, waiting.patience())


def print_logs_of(cluster: Cluster, part: str, screen: Screen, tail: int | None) -> None:
    """Print what the pods of a stage or a service have written so far.

    A log that cannot be read, of a pod on a lost node say, does not keep the others back.
    Raises PrerequisiteError where nothing is deployed.
    """
    snapshot = subject(cluster, part).look()
    if snapshot.owner is None:
        raise PrerequisiteError(
            f"nothing is deployed for {part} in namespace {cluster.namespace}: `make deploy-{part}`"
        )
    several = len({short_name(pod) for pod in snapshot.pods}) > 1
    for pod in snapshot.pods:
        try:
            print_log(cluster, pod, lambda who, line: screen.log(who if several else "", line), tail=tail)
        except ApiRefusal as refusal:
            screen.say(f"{pod['metadata']['name']}: {refusal}")
    screen.close()


def subject(cluster: Cluster, part: str) -> Subject:
    """What to look at for a stage or a service."""
    name, again = workload_name(part), watch_command(cluster, part)
    if part in SERVICES:
        return Subject(
            name,
            again,
            look=lambda: deployment_snapshot(cluster, part),
            facts=deployment_facts,
            verdict=lambda snapshot: rollout_verdict(snapshot, part),
        )
    return Subject(
        name,
        again,
        look=lambda: job_snapshot(cluster, part),
        facts=job_facts,
        verdict=lambda snapshot: job_verdict(snapshot, part),
    )


def _watched(cluster: Cluster, what: Subject, waiting: Waiting, screen: Screen, patience: Patience) -> Verdict:
    """Wait, with a thread a pod for the logs if they are asked for."""
    follower = LogFollower(cluster, screen.log, screen.say, tail=waiting.tail)

    def show(snapshot: Snapshot) -> None:
        if waiting.follow and snapshot.owner is not None:
            spec = snapshot.owner["spec"]
            follower.show(snapshot.pods, named=spec.get("parallelism", spec.get("replicas", 1)) > 1)

    ended = False
    try:
        verdict = Watch(what, patience, screen.say, show).wait()
        ended = True
    finally:
        follower.finish(LAST_LINES_SECONDS if ended else 0.0)
        screen.close()
    return verdict
