"""`rlhf undeploy`: everything of ours leaves the namespace, but the volume and the namespace itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from rlhf.cluster.api import CLAIM, CONFIG, DEPLOYMENT, JOB, POD, SERVICE, ApiRefusal, Cluster, Kind
from rlhf.cluster.documents import COMPONENT, PART_OF, SERVICES, component, title
from rlhf.cluster.jobs import remove_job
from rlhf.cluster.snapshot import pause

DRAIN_SECONDS = 90.0
"""So long a service's pods may finish what they accepted; their grace period is shorter."""

# What makes pods comes first; policies that fence them in, and what they read, later.
FIRST = (Kind("keda.sh/v1alpha1", "ScaledObject"), Kind("jobset.x-k8s.io/v1alpha2", "JobSet"), DEPLOYMENT)
THEN = (
    SERVICE,
    Kind("policy/v1", "PodDisruptionBudget"),
    Kind("monitoring.coreos.com/v1", "ServiceMonitor"),
    CONFIG,
    Kind("networking.k8s.io/v1", "NetworkPolicy"),
    Kind("v1", "ServiceAccount"),
)


def undeploy(cluster: Cluster, part: str | None, tell: Callable[[str], None]) -> None:
    """Delete our objects, or those of one stage or service, and wait until their Jobs' pods are gone.

    Never deletes a claim, a volume or a namespace; nor rights, which may be those of the account that asks.
    """
    labels = PART_OF + (f",{COMPONENT}={part}" if part else "")
    refused: list[str] = []
    for kind in FIRST:
        _delete_all(cluster, kind, labels, tell, refused)
    for job in cluster.list(JOB, labels=labels):
        remove_job(cluster, job, tell)
        tell(f"{title(job)} deleted")
    _wait_for_services(cluster, labels, tell)
    for kind in THEN:
        _delete_all(cluster, kind, labels, tell, refused)
    if refused:
        tell(f"left, as this account may not list or delete them: {', '.join(refused)}")
    if part is None:
        _tell_of_volumes(cluster, tell)


def _delete_all(cluster: Cluster, kind: Kind, labels: str, tell: Callable[[str], None], refused: list[str]) -> None:
    if not cluster.knows(kind):
        return
    try:
        for document in cluster.list(kind, labels=labels):
            cluster.delete(document)
            tell(f"{title(document)} deleted")
    except ApiRefusal as refusal:
        if refusal.status != 403:
            raise
        refused.append(kind.name)


def _wait_for_services(cluster: Cluster, labels: str, tell: Callable[[str], None]) -> None:
    """Wait until a service's pods are gone: the policies let their last answers out."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while pods := [pod for pod in cluster.list(POD, labels=labels) if component(pod) in SERVICES]:
        if time.monotonic() > deadline:
            tell(f"{title(pods[0])} has not ended; what stands around it is deleted all the same")
            return
        pause()


def _tell_of_volumes(cluster: Cluster, tell: Callable[[str], None]) -> None:
    """Say what stays, and how it is deleted."""
    for claim in cluster.list(CLAIM, labels=PART_OF):
        name = claim["metadata"]["name"]
        tell(
            f"the volume stays, with all runs: PersistentVolumeClaim {name}; to delete it and all that is on it: "
            f"kubectl -n {cluster.namespace} delete pvc {name}"
        )
