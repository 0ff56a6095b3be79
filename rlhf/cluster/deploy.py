"""`rlhf deploy`: one stage or service, or all stages in order from wherever the cluster is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf.cluster.api import DEPLOYMENT, FIELD_MANAGER, Cluster
from rlhf.cluster.apply import apply_documents, check_with_server, refuse_to_disturb
from rlhf.cluster.documents import SERVICES, SHARED, Document, belonging, identity, job_identity, workload_name
from rlhf.cluster.jobs import job_state, refuse_active, refuse_owned, remove_job
from rlhf.cluster.obstacles import crashes
from rlhf.cluster.screen import Screen
from rlhf.cluster.snapshot import deployment_snapshot, find_job
from rlhf.cluster.verdict import Verdict
from rlhf.cluster.waiting import Waiting, wait_for

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
    job = None if part in SERVICES else find_job(cluster, part)
    if job is not None:
        refuse_owned(job)
        if not manner.replace:
            refuse_active(cluster, job)
    wanted = [*belonging(documents, SHARED), *belonging(documents, part)]
    refuse_to_disturb(cluster, wanted, [part])
    # Before anything is taken away: what replaces it must be right.
    check_with_server(cluster, wanted, force=manner.force_conflicts)
    if job is not None:
        remove_job(cluster, job, tell)
    crashed = part in SERVICES and crashes(deployment_snapshot(cluster, part))
    apply_documents(cluster, wanted, tell, force=manner.force_conflicts)
    if crashed:
        _start_anew(cluster, part)


def _start_anew(cluster: Cluster, service: str) -> None:
    """Give a service new pods: those that crash may wait for minutes before they see what was mended.

    The note belongs to a manager of its own: as one of ours, the next deployment would take it away, with the pods.
    """
    note = {RESTART_ANNOTATION: datetime.now(UTC).isoformat(timespec="seconds")}
    metadata = {"name": workload_name(service), "namespace": cluster.namespace}
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
        heading = f"[{number}/{len(stages)}]"
        action = next_action(cluster, find_job(cluster, stage), documents, manner)
        screen.say(f"{heading} {stage} {action}")
        if action == DONE:
            continue
        if action != JOIN:
            deploy(cluster, documents, stage, manner, screen.say)
        verdict = wait_for(cluster, stage, waiting, screen, patience)
        if verdict.exit_code:
            return verdict
        screen.say(f"{heading} {verdict.line}")
    return Verdict(0, f"all stages of run {identity(documents).run} are done")


def next_action(cluster: Cluster, job: Document | None, documents: Sequence[Document], manner: Manner) -> str:
    """What to do about a stage, as a heading: DONE, JOIN, or words for deploying it.

    Raises ConflictError while its Job is at work on another run or with other settings, unless `manner.replace`.
    """
    state, wanted = job_state(job), identity(documents)
    if job is None:
        return f"starts for run {wanted.run}"
    theirs = job_identity(job)
    same = theirs == wanted
    if state == "complete" and same:
        return DONE
    if state == "active" and same and not manner.replace:
        return JOIN
    if not manner.replace:
        other_run = theirs.run and theirs.run != wanted.run
        refuse_active(cluster, job, f" with run {theirs.run!r}" if other_run else " with other settings than these")
    if state == "failed" and same:
        return "failed before; trying again"
    return "is at work; replacing its Job" if state == "active" else f"starts for run {wanted.run}"
