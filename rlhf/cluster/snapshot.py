"""What the cluster says of one Job or Deployment at one moment: the thing itself, its pods, claims and events."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rlhf.cluster.api import CLAIM, DEPLOYMENT, EVENT, JOB, POD, ApiRefusal, Cluster
from rlhf.cluster.documents import COMPONENT, PART_OF, Document, workload_name

LOOK_EVERY_SECONDS = 1.0
POD_HASH = "pod-template-hash"


@dataclass(frozen=True)
class Snapshot:
    """`owner` is None when it is not there; events and claims are read only while a pod is missing or waits."""

    owner: Document | None
    pods: tuple[Document, ...] = ()
    claims: tuple[Document, ...] = ()
    events: tuple[Document, ...] = ()

    def events_of(self, document: Document) -> list[Document]:
        """The events about an object, oldest first."""
        uid = document["metadata"]["uid"]
        return sorted((e for e in self.events if e["involvedObject"].get("uid") == uid), key=event_time)


def pause() -> None:
    """The time between two looks."""
    time.sleep(LOOK_EVERY_SECONDS)


def find_job(cluster: Cluster, stage: str) -> Document | None:
    """The Job of a stage: the one of its name, else the newest of its label, which a JobSet may have made."""
    if job := cluster.get(JOB, workload_name(stage)):
        return job
    labelled = cluster.list(JOB, labels=f"{PART_OF},{COMPONENT}={stage}")
    return max(labelled, key=lambda each: str(each["metadata"]["creationTimestamp"]), default=None)


def job_snapshot(cluster: Cluster, stage: str) -> Snapshot:
    """The Job of a stage and the pods of this very Job, not of an earlier one of the same name."""
    job = find_job(cluster, stage)
    if job is None:
        return Snapshot(None)
    return _with_reasons(cluster, job, job_pods(cluster, job["metadata"]["uid"]), job["spec"].get("parallelism", 1))


def job_pods(cluster: Cluster, uid: str) -> list[Document]:
    """The pods that the Job with this uid made, in the order of their names."""
    return _by_name(cluster.list(POD, labels=f"batch.kubernetes.io/controller-uid={uid}"))


def deployment_snapshot(cluster: Cluster, service: str) -> Snapshot:
    """The Deployment of a service and the pods of its newest template."""
    deployment = cluster.get(DEPLOYMENT, workload_name(service))
    if deployment is None:
        return Snapshot(None)
    labels = deployment["spec"]["selector"]["matchLabels"]
    pods = cluster.list(POD, labels=",".join(f"{key}={value}" for key, value in labels.items()))
    newest = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)
    if newest is not None:
        template = newest["metadata"]["labels"].get(POD_HASH)
        pods = [pod for pod in pods if pod["metadata"]["labels"].get(POD_HASH) == template]
    return _with_reasons(cluster, deployment, _by_name(pods), deployment["spec"].get("replicas", 1))


def _with_reasons(cluster: Cluster, owner: Document, pods: list[Document], wanted: int) -> Snapshot:
    """Add claims and events where something waits; accounts that may not read them do without."""
    phases = [phase(pod) for pod in pods]
    if phases.count("Running") + phases.count("Succeeded") >= wanted and "Pending" not in phases:
        return Snapshot(owner, tuple(pods))
    try:
        claims, events = cluster.list(CLAIM), cluster.list(EVENT)
    except ApiRefusal as refusal:
        if refusal.status != 403:
            raise
        claims, events = [], []
    return Snapshot(owner, tuple(pods), tuple(claims), tuple(events))


def phase(pod: Document) -> str:
    """Pending, Running, Succeeded, Failed or Unknown."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def container_statuses(pod: Document) -> list[Document]:
    """The statuses of a pod's containers, init containers first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def restart_count(pod: Document) -> int:
    """How often a pod's containers were started again."""
    return sum(status.get("restartCount", 0) for status in container_statuses(pod))


def short_name(pod: Document) -> str:
    """`rlhf-ppo-0` for a Job's pod, whichever try it is; the whole name for others."""
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])


def event_time(event: Document) -> str:
    """When an event was last seen, as text that sorts."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return str(next((time for time in times if time), event["metadata"].get("creationTimestamp", "")))


def _by_name(pods: list[Document]) -> list[Document]:
    return sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))
