"""`rlhf deploy`: one stage or service, or all stages in order from wherever the cluster is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf.cluster.api import DEPLOYMENT, FIELD_MANAGER, JOB, Cluster
from rlhf.cluster.apply import apply_documents, check_with_server, refuse_to_disturb
from rlhf.cluster.documents import SERVICES, SHARED, Document, belonging, identity, job_identity
from rlhf.cluster.jobs import job_name, job_state, refuse_active, remove_job
from rlhf.cluster.obstacles import crashes
from rlhf.cluster.screen import Screen
from rlhf.cluster.snapshot import deployment_snapshot
from rlhf.cluster.verdict import Verdict
from rlhf.cluster.waiting import Waiting, wait_for
from rlhf.errors import ConflictError

RESTART_ANNOTATION = "rlhf.summarizer/restarted"
DONE, JOIN = "is done already", "is at work already; joining it"


@dataclass(frozen=True)
class Manner:
    """replace: end an active Job first. force_conflicts: take over fields that others own."""

    replace: bool = False
    force_conflicts: bool = False


def deploy(
    cluster: Cluster, documents: Sequence[Document], part: str, manner: Manner, tell: Callable[[str], None]
) -> None:
    """Put a stage or a service into the cluster.

    Raises ConflictError while its Job is active, unless `manner.replace`, or where that would disturb another Job.
    """
    job = None if part in SERVICES else cluster.get(JOB, job_name(part))
    if not manner.replace:
        refuse_active(job, part)
    wanted = [*belonging(documents, SHARED), *belonging(documents, part)]
    refuse_to_disturb(cluster, wanted, [part])
    # Before anything is taken away: what replaces it must be right.
    if unchecked := check_with_server(cluster, wanted):
        tell(unchecked)
    if job is not None:
        remove_job(cluster, job, tell)
    crashed = part in SERVICES and crashes(deployment_snapshot(cluster, job_name(part)))
    apply_documents(cluster, wanted, tell, force=manner.force_conflicts)
    if crashed:
        _start_anew(cluster, part)


def _start_anew(cluster: Cluster, service: str) -> None:
    """Give a service new pods: those that crash may wait for minutes before they see what was mended.

    The note belongs to a manager of its own: as one of ours, the next deployment would take it away, with the pods.
    """
    note = {RESTART_ANNOTATION: datetime.now(UTC).isoformat(timespec="seconds")}
    metadata = {"name": job_name(service), "namespace": cluster.namespace}
    spec = {"template": {"metadata": {"annotations": note}}}
    document = {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.name, "metadata": metadata, "spec": spec}
    cluster.apply(document, force=True, manager=f"{FIELD_MANAGER}-restart")


def deploy_all(
    cluster: Cluster,
    documents: Sequence[Document],
    stages: Sequence[str],
    manner: Manner,
    waiting: Waiting,
    screen: Screen,
) -> Verdict:
    """Run the stages one after the other; what is done for this run is skipped, what is active is joined.

    Ends with the first stage that fails. Interrupted anywhere and called again, it goes on where the cluster is.
    """
    patience = waiting.patience()
    for number, stage in enumerate(stages, start=1):
        heading = f"[{number}/{len(stages)}] {stage}"
        action = next_action(cluster.get(JOB, job_name(stage)), documents, stage, manner)
        screen.say(f"{heading}: {action}")
        if action == DONE:
            continue
        if action != JOIN:
            deploy(cluster, documents, stage, manner, screen.say)
        verdict = wait_for(cluster, stage, waiting, screen, patience)
        if verdict.exit_code:
            return verdict
        screen.say(f"{heading}: {verdict.line}")
    return Verdict(0, f"all stages of run {identity(documents).run} are done")


def next_action(job: Document | None, documents: Sequence[Document], stage: str, manner: Manner) -> str:
    """What to do about a stage, as a heading: DONE, JOIN, or words for deploying it.

    Raises ConflictError while its Job is at work on another run or with other settings, unless `manner.replace`.
    """
    state, wanted = job_state(job), identity(documents)
    same = job is not None and job_identity(job) == wanted
    if state == "complete" and same:
        return DONE
    if state == "active" and not manner.replace:
        if same:
            return JOIN
        assert job is not None
        theirs = job_identity(job)
        what = f"run {theirs.run!r}" if theirs.run and theirs.run != wanted.run else "other settings than these"
        raise ConflictError(
            f"Job {job_name(stage)} is active with {what}: watch it with `make cluster-logs STAGE={stage}`, "
            "or replace it with --replace (it saves its state first)"
        )
    if state == "failed" and same:
        return "failed before; trying again"
    return "replacing the Job at work" if state == "active" else f"starting for run {wanted.run}"
