"""Documents put into the cluster by server-side apply, and the reasons for which that is refused.

The server merges what we state with what others state, field by field, and knows who stated what. A field that
another manager owns is theirs: an autoscaler's replicas, an operator's edit. Only `kubectl apply` is overruled, as
it puts these same manifests there; anybody else is named, and --force-conflicts overrules them, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rlhf.cluster.api import CONFIG, JOB, ApiRefusal, Cluster
from rlhf.cluster.documents import PART_OF, Document, component, config_data, title
from rlhf.cluster.jobs import job_state
from rlhf.errors import ConfigError, ConflictError, RlhfError

KUBECTL_APPLY = frozenset({"kubectl", "kubectl-client-side-apply"})
RIGHTS_GROUP = "rbac.authorization.k8s.io"
MANAGER = re.compile(r'conflict with "([^"]+)"')
# Namespaces before what lives in them, claims and rights before pods.
ORDER = ("Namespace", "StorageClass", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "PersistentVolumeClaim")
LAST = ("Deployment", "Job")
IMMUTABLE_CLAIM = "spec is immutable after creation"


def in_order(documents: Sequence[Document]) -> list[Document]:
    """The documents as they can be applied one after the other."""

    def place(document: Document) -> int:
        kind = document["kind"]
        if kind in ORDER:
            return ORDER.index(kind)
        return len(ORDER) + 1 + (LAST.index(kind) if kind in LAST else -1)

    return sorted(documents, key=place)


def apply_documents(
    cluster: Cluster, documents: Sequence[Document], tell: Callable[[str], None], *, force: bool = False
) -> None:
    """Apply documents in order.

    What only an administrator may touch, and an account that only deploys may not, is left to them, with a word.
    Raises ConflictError for fields that others own, ConfigError for what the server finds wrong.
    """
    left = []
    for document in in_order(documents):
        try:
            _apply(cluster, document, force=force)
        except ApiRefusal as refusal:
            if refusal.status == 403 and _is_administrators(cluster, document):
                left.append(title(document))
            elif document["kind"] == "PersistentVolumeClaim" and IMMUTABLE_CLAIM in str(refusal):
                tell(f"{title(document)} exists with other properties than the overlay's; the volume stays as it is")
            else:
                raise refused(document, refusal) from refusal
    if left := [name for name in left if not name.startswith("Namespace/")]:  # it must be there, as the rest went in
        tell(f"left to an administrator, as this account may not apply them: {', '.join(left)}")


def check_with_server(cluster: Cluster, documents: Sequence[Document], *, force: bool = False) -> str:
    """Have the server do all that `apply_documents` would, and keep nothing; what could not be checked, or nothing.

    Raises ConfigError and ConflictError as `apply_documents` does.
    """
    for document in in_order(documents):
        trial = document
        if document["kind"] == "Job":
            # An existing Job is immutable, and is not what we ask about.
            trial = {**document, "metadata": {**document["metadata"], "name": f"{document['metadata']['name']}-check"}}
        try:
            _apply(cluster, trial, force=force, dry_run=True)
        except ApiRefusal as refusal:
            if refusal.status == 403 and _is_administrators(cluster, document):
                continue
            if refusal.status == 404:
                return f"namespace {cluster.namespace} does not exist yet: what goes into it was not checked"
            if "dry run" in str(refusal):
                return f"an admission webhook cannot check without acting: {refusal}"
            if not (document["kind"] == "PersistentVolumeClaim" and IMMUTABLE_CLAIM in str(refusal)):
                raise refused(document, refusal) from refusal
    return ""


def _apply(cluster: Cluster, document: Document, *, force: bool, dry_run: bool = False) -> None:
    """Apply one document; fields that `kubectl apply` put there are taken over."""
    try:
        cluster.apply(document, force=force, dry_run=dry_run)
    except ApiRefusal as refusal:
        managers = conflicting_managers(refusal)
        if refusal.status != 409 or not managers or managers - KUBECTL_APPLY:
            raise
        cluster.apply(document, force=True, dry_run=dry_run)


def conflicting_managers(refusal: ApiRefusal) -> set[str]:
    """Who owns the fields that a refused apply would have changed."""
    causes = (refusal.details.get("details") or {}).get("causes") or []
    return {manager for cause in causes for manager in MANAGER.findall(cause.get("message", ""))}


def refused(document: Document, refusal: ApiRefusal) -> RlhfError:
    """The error that says what the server's refusal means."""
    if refusal.status == 409 and (managers := conflicting_managers(refusal)):
        fields = [cause.get("field", "") for cause in refusal.details["details"]["causes"]]
        return ConflictError(
            f"{title(document)}: {', '.join(fields)} was set by {', '.join(sorted(managers))}; "
            "leave it out of the overlay, or take it over with --force-conflicts"
        )
    if document["kind"] == "Job" and refusal.status == 422 and "field is immutable" in str(refusal):
        return ConflictError(f"{title(document)} was created by somebody else a moment ago; look with `cluster-status`")
    if refusal.status in (400, 422):
        return ConfigError(f"{title(document)}: {refusal}")
    return refusal


def _is_administrators(cluster: Cluster, document: Document) -> bool:
    """Whether a document is of the cluster rather than of the namespace, or gives rights."""
    return document["apiVersion"].startswith(RIGHTS_GROUP) or not cluster.is_namespaced(document)


def refuse_to_disturb(cluster: Cluster, documents: Sequence[Document], stages: Sequence[str]) -> None:
    """Raise ConflictError where new ConfigMaps would reach pods of a Job at work.

    All Jobs share the ConfigMaps: a pod that replaces an evicted one would go on with another run or other settings.
    stages are those whose Jobs are being replaced.
    """
    changed = [
        document["metadata"]["name"]
        for document in documents
        if document["kind"] == "ConfigMap" and _differs(cluster, document)
    ]
    if not changed:
        return
    for job in cluster.list(JOB, labels=PART_OF):
        if job_state(job) in ("active", "leaving") and component(job) not in stages:
            raise ConflictError(
                f"Job {job['metadata']['name']} is active and shares ConfigMap {', '.join(changed)}, which would "
                "change under it: wait for it, give the same --run, --config and --set, or use another --namespace"
            )


def _differs(cluster: Cluster, document: Document) -> bool:
    """Whether a ConfigMap is there with other contents."""
    name = document["metadata"]["name"]
    there = cluster.get(CONFIG, name)
    return there is not None and config_data([there], name) != config_data([document], name)
