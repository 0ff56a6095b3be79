"""`rlhf cluster-status`: a line a stage, and how the service is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf.cluster.api import DEPLOYMENT, EVENT, SERVICE, ApiRefusal, Cluster
from rlhf.cluster.documents import SERVICES, Document, job_identity, workload_name
from rlhf.cluster.jobs import job_state
from rlhf.cluster.lines import Progress, parse_progress
from rlhf.cluster.obstacles import deployment_facts, job_facts
from rlhf.cluster.snapshot import Snapshot, deployment_snapshot, job_snapshot, phase
from rlhf.cluster.streams import whole_lines
from rlhf.cluster.verdict import job_verdict, last_words
from rlhf.errors import UnavailableError
from rlhf.status import duration

COLUMNS = ("stage", "state", "run", "step", "reward", "time left", "retries", "node")
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
CREATED = "SuccessfulCreate"
LOG_LINES = 400
LOG_SECONDS = 10.0


@dataclass
class Row:
    """What is known of a stage; `why` is a line of its own below the table."""

    stage: str
    state: str = "absent"
    run: str = ""
    progress: Progress | None = None
    retries: str = ""
    node: str = ""
    why: str = ""
    unread: set[str] = field(default_factory=set)

    def cells(self) -> tuple[str, ...]:
        """The row's texts, in the order of COLUMNS."""
        step = reward = left = ""
        if self.progress is not None:
            step = f"{self.progress.done} of {self.progress.total} {self.progress.unit}"
            reward = dict(self.progress.shown).get("reward", "")
            if self.state == "running" and self.progress.seconds_left is not None:
                left = duration(self.progress.seconds_left)
        return self.stage, self.state, self.run, step, reward, left, self.retries, self.node


def overview(cluster: Cluster, stages: Sequence[str]) -> str:
    """The whole answer of `cluster-status`; what the account may not read is left out and named."""
    events, unread = _events(cluster)
    rows = [stage_row(cluster, stage, events) for stage in stages]
    lines = table([COLUMNS, *(row.cells() for row in rows)])
    lines += [f"{row.stage}: {row.why}" for row in rows if row.why]
    lines += [line for service in SERVICES for line in service_lines(cluster, service)]
    if missing := sorted(unread.union(*(row.unread for row in rows))):
        lines.append(f"not shown: {', '.join(missing)}")
    return "\n".join(lines)


def _events(cluster: Cluster) -> tuple[list[Document], set[str]]:
    """The namespace's events; none, and a word, for an account that may not read them."""
    try:
        return cluster.list(EVENT), set()
    except ApiRefusal as refusal:
        if refusal.status != 403:
            raise
        return [], {"events (not allowed)"}


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with columns as wide as their widest cell; columns without any cell below the heading are left out."""
    kept = [index for index in range(len(rows[0])) if index < 2 or any(row[index] for row in rows[1:])]
    widths = [max(len(row[index]) for row in rows) for index in kept]
    return [
        "  ".join(row[index].ljust(width) for index, width in zip(kept, widths, strict=True)).rstrip() for row in rows
    ]


def stage_row(cluster: Cluster, stage: str, events: Sequence[Document]) -> Row:
    """A stage's state, read from its Job, its pods and the newest progress in their logs."""
    row = Row(stage)
    snapshot = job_snapshot(cluster, stage)
    job = snapshot.owner
    if job is None:
        return row
    row.run = job_identity(job).run
    row.state, row.why = stage_state(snapshot, stage)
    row.retries = str(retries(job, snapshot.pods, events))
    row.node = ", ".join(sorted({pod["spec"]["nodeName"] for pod in snapshot.pods if phase(pod) == "Running"}))
    if snapshot.pods:
        try:
            row.progress = newest_progress(cluster, snapshot.pods)
        except ApiRefusal as refusal:
            if refusal.status == 403:
                row.unread.add("logs (not allowed)")
        except UnavailableError as error:
            row.unread.add(f"the log of {stage} ({error})")
    return row


def stage_state(snapshot: Snapshot, stage: str) -> tuple[str, str]:
    """A word for the state, and a line that explains it where one is needed."""
    job = snapshot.owner
    assert job is not None
    if job_state(job) == "leaving":
        return "leaving", ""
    verdict = job_verdict(snapshot, stage)
    if verdict is not None:
        return ("failed", verdict.line) if verdict.exit_code else ("done", done_words(snapshot.pods))
    if job["spec"].get("suspend"):
        return "suspended", "; ".join(str(fact) for fact in job_facts(snapshot) if fact.about == "suspended")
    blocked = [str(fact) for fact in job_facts(snapshot) if fact.blocks]
    running = any(phase(pod) == "Running" for pod in snapshot.pods)
    return "running" if running and not blocked else "waiting", "; ".join(blocked)


def done_words(pods: Sequence[Document]) -> str:
    """What the last container left as its termination message, if anything."""
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses", []):
            if words := last_words((status["state"].get("terminated") or {}).get("message", "")):
                return words
    return ""


def retries(job: Document, pods: Sequence[Document], events: Sequence[Document]) -> int:
    """How often a pod was tried again, as far as the cluster still knows.

    Failures that count, pods beyond the first, or pods that the Job's events (kept for an hour) say were created:
    whichever shows more.
    """
    uid, wanted = job["metadata"]["uid"], job["spec"].get("completions", 1)
    created = [each for each in events if each.get("reason") == CREATED and each["involvedObject"].get("uid") == uid]
    failed = job.get("status", {}).get("failed", 0)
    return max(failed, len(pods) - wanted, len(created) - wanted, 0)


def newest_progress(cluster: Cluster, pods: Sequence[Document]) -> Progress | None:
    """The newest progress that the first rank's newest pod has logged."""
    first = [pod for pod in pods if pod["metadata"]["labels"].get(INDEX_LABEL, "0") == "0"]
    newest = max(first, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)
    if newest is None or phase(newest) == "Pending":
        return None
    query = [("container", newest["spec"]["containers"][0]["name"]), ("tailLines", str(LOG_LINES))]
    pieces = cluster.log(newest["metadata"]["name"], query, read_seconds=LOG_SECONDS)
    found = [progress for line in whole_lines(pieces, ended=True) if (progress := parse_progress(line))]
    return found[-1] if found else None


def service_lines(cluster: Cluster, service: str) -> list[str]:
    """How many pods of a service are ready, and its addresses."""
    name = workload_name(service)
    deployment, address = cluster.get(DEPLOYMENT, name), cluster.get(SERVICE, name)
    if deployment is None:
        return [f"{service}: absent"]
    ready, wanted = deployment.get("status", {}).get("readyReplicas", 0), deployment["spec"].get("replicas", 1)
    lines = [f"{service}: {ready} of {wanted} pods ready"]
    if address is not None:
        port = address["spec"]["ports"][0]["port"]
        lines[0] += f", http://{name}.{cluster.namespace}.svc:{port} in the cluster"
        for entry in (address.get("status", {}).get("loadBalancer") or {}).get("ingress", []):
            lines[0] += f", http://{entry.get('hostname') or entry.get('ip')}:{port}"
        lines.append(f"  from here: kubectl -n {cluster.namespace} port-forward service/{name} {port}")
    if ready < wanted:
        facts = deployment_facts(deployment_snapshot(cluster, service))
        lines += [f"  {fact}" for fact in facts if fact.blocks]
    return lines
