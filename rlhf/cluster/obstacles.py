"""What stands in a Job's or a rollout's way, and what happened to its pods. Pure functions of a snapshot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf.cluster.documents import GPU, Document, conditions
from rlhf.cluster.snapshot import Snapshot, container_statuses, event_time, phase, short_name
from rlhf.cluster.verdict import endings, telling
from rlhf.errors import PERMANENT_CODES

PULL_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff"})
IMAGE_REASONS = PULL_REASONS | {"InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
PULL_FAILED = "Failed to pull image"
CONTAINER_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
# A claim that waits for its pod to find a node: the pod's own reason is the one to tell.
POD_FIRST_REASONS = frozenset({"WaitForFirstConsumer", "WaitForPodScheduled"})
CRASH_LOOP = "CrashLoopBackOff"
POD_IN_MESSAGE = re.compile(r'pods "[^"]+"')


@dataclass(frozen=True)
class Fact:
    """Something worth a line, once. `about` stays the same while `text` may be put differently.

    blocks: nothing goes on until it is mended. exit_code: what a container that starts again and again ends with.
    """

    about: str
    who: str
    text: str
    blocks: bool = False
    exit_code: int = 69

    def __str__(self) -> str:
        return f"{self.who}: {self.text}"


def job_facts(snapshot: Snapshot) -> list[Fact]:
    """What is to be told of a Job that is at work."""
    job = snapshot.owner
    assert job is not None
    facts = []
    if job["spec"].get("suspend"):
        words = (conditions(job).get("Suspended") or {}).get("message", "")
        queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        waits = f"waits in Kueue's queue {queue!r}" if queue else "is suspended"
        facts.append(Fact("suspended", job["metadata"]["name"], f"{waits} {f'({words})' if words else ''}".strip()))
    facts += _denials(snapshot, job["metadata"]["name"])
    facts += [fact for pod in snapshot.pods for fact in _history(pod, job)]
    return facts + _merged(_pod_facts(snapshot)) + _claim_facts(snapshot)


def crashes(snapshot: Snapshot) -> bool:
    """Whether a pod waits ever longer before it starts once more."""
    waiting = [each.get("state", {}).get("waiting") or {} for pod in snapshot.pods for each in container_statuses(pod)]
    return any(state.get("reason") == CRASH_LOOP for state in waiting)


def deployment_facts(snapshot: Snapshot) -> list[Fact]:
    """What is to be told of a Deployment whose pods are not all ready."""
    deployment = snapshot.owner
    assert deployment is not None
    facts = []
    if failure := conditions(deployment).get("ReplicaFailure"):
        text = f"pods cannot be created: {_without_pod_name(failure['message'])}"
        facts.append(Fact("denied", deployment["metadata"]["name"], text, blocks=True))
    return facts + _merged(_pod_facts(snapshot)) + _claim_facts(snapshot)


def _denials(snapshot: Snapshot, name: str) -> list[Fact]:
    """Quota and admission: the Job's own event that no pod could be created, while it is newer than its pods."""
    assert snapshot.owner is not None
    denied = [event for event in snapshot.events_of(snapshot.owner) if event.get("reason") == "FailedCreate"]
    born = max((str(pod["metadata"]["creationTimestamp"]) for pod in snapshot.pods), default="")
    if not denied or event_time(denied[-1]) < born:
        return []
    words = _without_pod_name(denied[-1]["message"].removeprefix("Error creating: "))
    return [Fact("denied", name, f"pods cannot be created: {words}", blocks=True)]


def _without_pod_name(message: str) -> str:
    """Every attempt has a new name: left in, each would be news."""
    return POD_IN_MESSAGE.sub("pods", message)


def _history(pod: Document, job: Document) -> list[Fact]:
    """Where a pod runs, and how one ended that another replaces."""
    name, uid, node = short_name(pod), pod["metadata"]["uid"], pod["spec"].get("nodeName", "")
    if disruption := conditions(pod).get("DisruptionTarget"):
        words = f"{disruption.get('reason', '')}: {disruption.get('message', '')}".strip(": ")
        return [Fact(f"ended/{uid}", name, f"is taken away ({words}); another pod goes on from the last save")]
    if phase(pod) == "Failed" and (ending := telling(endings([pod]))):
        if ending.exit_code == 75:
            return [Fact(f"ended/{uid}", name, "stopped with its state saved; another pod goes on")]
        if ending.exit_code in PERMANENT_CODES:  # the verdict follows, and says it
            return []
        limit = job["spec"].get("backoffLimit", 6)
        return [Fact(f"ended/{uid}", name, f"{ending.describe()}; another pod tries again (backoffLimit {limit})")]
    if phase(pod) == "Running":
        return [Fact(f"runs/{uid}", name, f"runs on {node}")]
    return []


def _pod_facts(snapshot: Snapshot) -> list[Fact]:
    """Each waiting pod's reason."""
    facts = []
    for pod in snapshot.pods:
        trouble = _container_trouble(pod, snapshot.events_of(pod))
        if trouble is not None:
            facts.append(trouble)
        elif phase(pod) == "Pending" and "deletionTimestamp" not in pod["metadata"]:
            facts.append(_waiting(pod, snapshot.events_of(pod)))
    return facts


def _container_trouble(pod: Document, events: list[Document]) -> Fact | None:
    """A container that cannot start, in the kubelet's words."""
    name = short_name(pod)
    for status in container_statuses(pod):
        waiting = status.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in IMAGE_REASONS:
            return Fact(
                f"image/{name}", name, _pull_text(reason, status.get("image", ""), message, events), blocks=True
            )
        if reason in CONTAINER_REASONS:
            return Fact(f"container/{name}", name, f"{reason}: {message}", blocks=True)
        if reason == CRASH_LOOP and (ending := telling(endings([pod]))):
            text = f"starts again and again ({status.get('restartCount', 0)} times); {ending.describe()}"
            return Fact(f"crash/{name}", name, text, blocks=True, exit_code=ending.exit_code)
    return None


def _pull_text(reason: str, image: str, message: str, events: list[Document]) -> str:
    """Why an image is not there; the kubelet's two alternating reasons are one, and read the same."""
    told = [event["message"] for event in events if event.get("message", "").startswith(PULL_FAILED)]
    if reason == "ImagePullBackOff" and told and ": ErrImagePull: " not in message:
        message = told[-1]  # before Kubernetes 1.31 the state itself does not name the cause
    cause = message.rpartition("ErrImagePull: ")[2] or "no reason given"
    name = "ImagePullBackOff" if reason in PULL_REASONS else reason
    return f"image {image} cannot be had ({name}): {cause}; is it pushed, and may the node pull it?"


def _waiting(pod: Document, events: list[Document]) -> Fact:
    """Why a pod whose containers have no trouble of their own has not started."""
    name = short_name(pod)
    for entry in pod.get("status", {}).get("conditions", []):
        if entry["type"] == "PodScheduled" and entry["status"] == "False":
            text = f"{entry.get('reason', 'Unschedulable')}: {entry.get('message', '')} (a pod asks for {_asks(pod)})"
            return Fact(f"node/{name}", name, text, blocks=True)
    if not pod["spec"].get("nodeName"):
        return Fact(f"node/{name}", name, "no scheduler has looked at it yet", blocks=True)
    if events and events[-1].get("type") == "Warning":
        text = f"{events[-1].get('reason', '')}: {events[-1].get('message', '')}"
        return Fact(f"start/{name}", name, " ".join(text.split()), blocks=True)
    pulling = f": {events[-1].get('message', '')}" if events and events[-1].get("reason") == "Pulling" else ""
    return Fact(f"starting/{name}", name, f"is being started on {pod['spec']['nodeName']}{pulling}")


def _asks(pod: Document) -> str:
    """`nvidia.com/gpu: 8, cpu: 32, memory: 512Gi`, the rarest first."""
    requests = pod["spec"]["containers"][0].get("resources", {}).get("requests", {})
    order = sorted(requests, key=lambda name: (name != GPU, name))
    return ", ".join(f"{name}: {requests[name]}" for name in order) or "nothing in particular"


def _claim_facts(snapshot: Snapshot) -> list[Fact]:
    """Volumes that pods wait for."""
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in snapshot.pods
        if phase(pod) == "Pending"
        for volume in pod["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    facts = []
    for claim in snapshot.claims:
        name = claim["metadata"]["name"]
        if name not in used or claim.get("status", {}).get("phase") != "Pending":
            continue
        events = snapshot.events_of(claim)
        if events and events[-1].get("reason") in POD_FIRST_REASONS:
            continue
        words = events[-1].get("message", "") if events else "nothing provides it yet"
        wanted = claim["spec"]
        modes, chosen = ", ".join(wanted.get("accessModes", [])), wanted.get("storageClassName")
        text = (
            f"is Pending: {' '.join(words.split())} (asks for {modes}, "
            f"{f'storage class {chosen}' if chosen else 'the default storage class'}); "
            "name a class that provides such volumes in the overlay: k8s/components/storage-*"
        )
        facts.append(Fact(f"claim/{name}", f"PersistentVolumeClaim {name}", text, blocks=True))
    return facts


def _merged(facts: Iterable[Fact]) -> list[Fact]:
    """One fact for all pods that have the same to say."""
    first: dict[str, Fact] = {}
    more: dict[str, int] = {}
    for fact in facts:
        if fact.text in first:
            more[fact.text] = more.get(fact.text, 0) + 1
        else:
            first[fact.text] = fact
    return [
        Fact(f.about, f"{f.who} and {more[f.text]} more", f.text, f.blocks, f.exit_code) if f.text in more else f
        for f in first.values()
    ]
