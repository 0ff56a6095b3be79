"""How a Job or a rollout ended: its exit code, and the one line that matters. Pure functions of a snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlhf.cluster.documents import Document, conditions
from rlhf.cluster.lines import parse_line
from rlhf.cluster.snapshot import Snapshot, container_statuses, phase, short_name
from rlhf.errors import PERMANENT_CODES

# What containers end with when others end them: hardly ever the reason of anything.
STOPPED_CODES = (75, 137, 143)
OUT_OF_MEMORY = "OOMKilled"


@dataclass(frozen=True)
class Verdict:
    """How it ended; `exit_code` is 0 for success."""

    exit_code: int
    line: str


@dataclass(frozen=True)
class Ending:
    """A container that ended badly; `container` is empty where the pod failed as a whole."""

    pod: str
    container: str
    exit_code: int
    reason: str
    message: str
    finished: str

    def describe(self) -> str:
        """`exit code 66: <its last words>`."""
        if self.reason == OUT_OF_MEMORY:
            return (
                "it took more memory than its limit (OOMKilled): raise the limit in the overlay, "
                "or lower the stage's micro_batch_size"
            )
        words = last_words(self.message) or self.reason or "no reason given"
        return f"exit code {self.exit_code}: {words}" if self.container else words


def endings(pods: Iterable[Document]) -> list[Ending]:
    """Every bad ending that the pods show, the running containers' former ones included."""
    found: list[Ending] = []
    for pod in pods:
        name, before = short_name(pod), len(found)
        for status in container_statuses(pod):
            for state in (status.get("state", {}), status.get("lastState", {})):
                ended = state.get("terminated")
                if ended and ended.get("exitCode"):
                    reason, message = ended.get("reason", ""), ended.get("message", "")
                    finished = str(ended.get("finishedAt") or "")
                    found.append(Ending(name, status["name"], ended["exitCode"], reason, message, finished))
                    break
        if len(found) == before and phase(pod) == "Failed":
            reason, message = pod["status"].get("reason", ""), pod["status"].get("message", "")
            found.append(Ending(name, "", 1, reason, message or reason, str(pod["metadata"]["creationTimestamp"])))
    return found


def telling(found: list[Ending]) -> Ending | None:
    """The ending that explains the others: a refusal, then lack of memory, then any error; of equals the latest."""

    def weight(ending: Ending) -> tuple[int, str]:
        if ending.exit_code in PERMANENT_CODES:
            return 3, ending.finished
        if ending.reason == OUT_OF_MEMORY:
            return 2, ending.finished
        return int(ending.exit_code not in STOPPED_CODES), ending.finished

    return max(found, key=weight, default=None)


def job_verdict(snapshot: Snapshot, stage: str) -> Verdict | None:
    """The verdict of a stage's Job; None while it is at work."""
    assert snapshot.owner is not None
    true = conditions(snapshot.owner)
    if "Complete" in true:
        return Verdict(0, f"{stage} is done")
    # FailureTarget comes first, while the last pods still leave.
    failed = true.get("Failed") or true.get("FailureTarget")
    if failed is None:
        return None
    reason, ending = failed.get("reason", ""), telling(endings(snapshot.pods))
    if reason == "DeadlineExceeded":
        limit = snapshot.owner["spec"].get("activeDeadlineSeconds")
        code = ending.exit_code if ending else 75
        return Verdict(
            code,
            f"{stage} ran past its activeDeadlineSeconds of {limit} (DeadlineExceeded); what it saved is kept: "
            f"deploy it again to go on, or raise the deadline in the overlay",
        )
    if ending is None:
        return Verdict(1, f"{stage} failed: {failed.get('message') or reason}; its pods are gone, and their logs")
    count = len(endings(snapshot.pods))
    tries = f" after {count} tries" if reason == "BackoffLimitExceeded" and count > 1 else ""
    where = f"{ending.pod}, container {ending.container}" if ending.container else ending.pod
    return Verdict(ending.exit_code, f"{stage} failed{tries} ({where}): {ending.describe()}")


def rollout_verdict(snapshot: Snapshot, service: str) -> Verdict | None:
    """The verdict of a Deployment's rollout; None while it goes on."""
    deployment = snapshot.owner
    assert deployment is not None
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return None
    ready = status.get("updatedReplicas", 0) == status.get("replicas", 0) == status.get("availableReplicas", 0)
    if ready and status.get("replicas", 0) >= wanted:
        return Verdict(0, f"{service} is ready: {wanted} of {wanted} pods")
    for entry in status.get("conditions", []):
        if entry["type"] == "Progressing" and entry.get("reason") == "ProgressDeadlineExceeded":
            ending = telling(endings(snapshot.pods))
            words = f"{ending.pod}: {ending.describe()}" if ending else entry.get("message", "")
            return Verdict(ending.exit_code if ending else 69, f"{service} did not become ready in time; {words}")
    return None


def last_words(message: str) -> str:
    """The last line of a termination message; of a JSON log line what it says."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    said = parse_line(lines[-1])
    if said is None:
        return lines[-1]
    return said.traceback.strip().splitlines()[-1] if said.traceback.strip() else said.message
