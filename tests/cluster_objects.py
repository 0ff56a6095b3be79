"""Jobs, pods, events and claims as the API gives them, cut down to what matters."""

from __future__ import annotations

from typing import Any

from rlhf.cluster.documents import COMPONENT, Document
from rlhf.cluster.snapshot import Snapshot

NOON = "2026-01-02T12:00:00Z"


def job(*conditions: Document, suspend: bool = False, labels: dict[str, str] | None = None, **status: Any) -> Document:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": "rlhf-ppo",
            "uid": "job",
            "labels": {COMPONENT: "ppo", **(labels or {})},
            "creationTimestamp": NOON,
        },
        "spec": {
            "suspend": suspend,
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 6,
            "activeDeadlineSeconds": 3600,
            "template": {"spec": {"terminationGracePeriodSeconds": 180}},
        },
        "status": {"conditions": list(conditions), **status},
    }


def condition(kind: str, reason: str = "", message: str = "", status: str = "True") -> Document:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pod(
    *,
    index: int = 0,
    suffix: str = "abcde",
    phase: str = "Pending",
    node: str = "",
    states: dict[str, Document] | None = None,
    conditions: tuple[Document, ...] = (),
    born: str = NOON,
) -> Document:
    """A pod of ppo; states are of its containers `check` and `stage`."""
    states = states or {}
    name = f"rlhf-ppo-{index}-{suffix}"

    def status(container: str) -> Document:
        given = dict(states.get(container, {"waiting": {"reason": "PodInitializing"}}))
        extra = {key: given.pop(key) for key in ("lastState", "restartCount") if key in given}
        return {"name": container, "image": "r/rlhf-summarizer:1", "restartCount": 0, "state": given, **extra}

    requests = {"cpu": "32", "memory": "512Gi", "nvidia.com/gpu": "8"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "uid": name, "creationTimestamp": born, "labels": {}},
        "spec": {
            "hostname": f"rlhf-ppo-{index}",
            "restartPolicy": "Never",
            "initContainers": [{"name": "check"}],
            "containers": [{"name": "stage", "resources": {"requests": requests}}],
            "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": "rlhf-runs"}}],
            **({"nodeName": node} if node else {}),
        },
        "status": {
            "phase": phase,
            "conditions": list(conditions),
            "initContainerStatuses": [status("check")] if states else [],
            "containerStatuses": [status("stage")] if states else [],
        },
    }


def ended(code: int, message: str = "", reason: str = "Error", at: str = NOON) -> Document:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}}


def waiting(reason: str, message: str = "") -> Document:
    return {"waiting": {"reason": reason, "message": message}}


RUNNING: Document = {"running": {"startedAt": NOON}}
UNSCHEDULABLE = condition(
    "PodScheduled", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", status="False"
)


def event(about: Document, reason: str, message: str, *, kind: str = "Warning", at: str = NOON) -> Document:
    return {
        "metadata": {"name": "event", "creationTimestamp": at},
        "involvedObject": {"uid": about["metadata"]["uid"]},
        "type": kind,
        "reason": reason,
        "message": message,
        "lastTimestamp": at,
    }


def claim(phase: str = "Pending", storage_class: str | None = None) -> Document:
    spec: Document = {"accessModes": ["ReadWriteMany"]}
    if storage_class:
        spec["storageClassName"] = storage_class
    metadata = {"name": "rlhf-runs", "uid": "claim", "creationTimestamp": NOON}
    return {"kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec, "status": {"phase": phase}}


def seen(
    owner: Document, *pods: Document, events: tuple[Document, ...] = (), claims: tuple[Document, ...] = ()
) -> Snapshot:
    return Snapshot(owner, pods, claims, events)
