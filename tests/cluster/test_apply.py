"""Every overlay is accepted by a real API server that enforces the restricted profile."""

from __future__ import annotations

import pytest

from rlhf.cluster.api import Cluster
from rlhf.cluster.apply import apply_documents
from rlhf.cluster.documents import title
from rlhf.cluster.edits import with_namespace
from rlhf.cluster.render import kustomize
from tests.conftest import REPOSITORY

CUSTOM = {"JobSet", "ScaledObject", "ServiceMonitor"}
OVERLAYS = sorted(folder.parent for folder in (REPOSITORY / "k8s" / "overlays").glob("*/kustomization.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)
def test_the_server_accepts_an_overlay_without_a_warning(overlay, cluster: Cluster, warned: list[str]) -> None:
    documents = with_namespace(kustomize(overlay), cluster.namespace)
    known = [document for document in documents if document["kind"] not in CUSTOM]
    said: list[str] = []
    apply_documents(cluster, known, said.append)
    assert (said, warned) == ([], [])
    for document in known:
        labels = cluster.apply(document)["metadata"]["labels"]  # again: nothing changes, nothing conflicts
        assert labels["app.kubernetes.io/part-of"] == "rlhf-summarizer", title(document)
