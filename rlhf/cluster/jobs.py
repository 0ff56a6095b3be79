"""The life of a stage's Job: what state it is in, making room for a new one, never two writers on the volume."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from rlhf.cluster.api import JOB, Cluster
from rlhf.cluster.documents import NAMESPACE, Document, component, conditions
from rlhf.cluster.snapshot import job_pods, pause
from rlhf.errors import ConflictError, UnavailableError

State = Literal["absent", "leaving", "active", "complete", "failed"]
# Past their own grace period, pods may take so much longer until they are really gone.
SLACK_SECONDS = 60.0


def job_state(job: Document | None) -> State:
    """What a Job is doing; one that is suspended, in a queue say, is active."""
    if job is None:
        return "absent"
    if "deletionTimestamp" in job["metadata"]:
        return "leaving"
    true = conditions(job)
    return "complete" if "Complete" in true else "failed" if "Failed" in true else "active"


def watch_command(cluster: Cluster, part: str) -> str:
    """What to type to watch a stage or a service."""
    place = f"--namespace {cluster.namespace}" if cluster.namespace != NAMESPACE else ""
    place += f" --context {cluster.context}" if cluster.context else ""
    return f"make cluster-logs STAGE={part}" + (f" ARGS='{place.strip()}'" if place else "")


def refuse_active(cluster: Cluster, job: Document, with_what: str = "") -> None:
    """Raise ConflictError for a Job at work; with_what adds what it works on."""
    name, stage = job["metadata"]["name"], component(job)
    if job_state(job) == "active":
        raise ConflictError(
            f"Job {name} is active{with_what}: watch it with `{watch_command(cluster, stage)}`, "
            "or replace it with --replace (it saves its state first)"
        )


def refuse_owned(job: Document) -> None:
    """Raise ConflictError for a Job that another object made: deleted, it would be made again."""
    for owner in job["metadata"].get("ownerReferences", []):
        raise ConflictError(
            f"Job {job['metadata']['name']} belongs to {owner['kind']} {owner['name']}; to run stages one by one, "
            f"`kubectl delete {owner['kind'].lower()} {owner['name']}` first"
        )


def remove_job(cluster: Cluster, job: Document, tell: Callable[[str], None]) -> None:
    """Delete a Job and wait until it and its pods are gone; the pods of one at work save their state first.

    Raises UnavailableError when a pod stays, on a node that is lost say.
    """
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    pods = job_pods(cluster, uid)
    grace = job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
    if job_state(job) != "leaving":
        # Foreground: the Job stays to be seen, and holds its name, until its pods are gone.
        cluster.delete(job, uid=uid, propagation="Foreground")
    if any(pod["status"].get("phase") == "Running" for pod in pods):
        tell(f"{name}: waiting until its pods have saved and are gone (up to {grace} seconds)")
    deadline = time.monotonic() + grace + SLACK_SECONDS
    while True:
        now = cluster.get(JOB, name)
        same = now is not None and now["metadata"]["uid"] == uid
        pods = job_pods(cluster, uid)
        if not same and not pods:
            return
        if time.monotonic() > deadline:
            raise _stays(name, pods)
        pause()


def _stays(name: str, pods: list[Document]) -> UnavailableError:
    """The error for a Job that does not go away."""
    if not pods:
        return UnavailableError(f"Job {name} is being deleted, but stays: is the cluster's controller manager at work?")
    pod = pods[0]
    return UnavailableError(
        f"pod {pod['metadata']['name']} does not end on node {pod['spec'].get('nodeName')}; if that node is lost for "
        f"good, `kubectl delete pod {pod['metadata']['name']} --force` lets the stage go on elsewhere"
    )
