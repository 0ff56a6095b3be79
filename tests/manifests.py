"""The manifests as their users meet them: files that apply alone, and overlays rendered by kustomize."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

MANIFESTS = REPOSITORY / "k8s"
BASE = MANIFESTS / "base"
FILES = sorted(path for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")
OVERLAYS = sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (MANIFESTS / "components").glob("*/kustomization.yaml"))

Document = dict[str, Any]
Documents = tuple[Document, ...]


@functools.cache
def base() -> Documents:
    """Every object of the base, read without any tool."""
    return tuple(document for path in FILES for document in yaml.safe_load_all(path.read_text(encoding="utf-8")))


def extras() -> Documents:
    """The base with what stands beside it for use by hand."""
    paths = sorted((MANIFESTS / "extras").glob("*.yaml"))
    return base() + tuple(d for path in paths for d in yaml.safe_load_all(path.read_text(encoding="utf-8")))


@functools.cache
def overlay(name: str) -> Documents:
    """The objects of an overlay; the test is skipped where kustomize is missing."""
    return tuple(yaml.safe_load_all(kustomize(MANIFESTS / "overlays" / name)))


@functools.cache
def component(name: str) -> Documents:
    """The objects of the base with one component."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "k8s"
        shutil.copytree(MANIFESTS, folder, symlinks=True)
        target = folder / "overlays" / "tried"
        target.mkdir()
        (target / "kustomization.yaml").write_text(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
            f"resources: [../../base]\ncomponents: [../../components/{name}]\n",
            encoding="utf-8",
        )
        return tuple(yaml.safe_load_all(kustomize(target)))


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` prints."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; it renders the overlays: https://kubernetes.io/docs/tasks/tools/")
    rendered = subprocess.run(["kubectl", "kustomize", str(folder)], check=False, capture_output=True, text=True)
    assert rendered.returncode == 0, rendered.stderr
    return rendered.stdout


def find(documents: Any, kind: str, name: str) -> Document:
    """The one object of this kind and name."""
    (found,) = (d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)
    return dict(found)


def of_kind(documents: Any, *kinds: str) -> list[Document]:
    """The objects of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def pod_templates(documents: Any) -> Iterator[tuple[str, Document]]:
    """Every pod template with a name to show."""
    for document in documents:
        if document["kind"] in ("Job", "Deployment"):
            yield f"{document['kind']}/{document['metadata']['name']}", document["spec"]["template"]
        elif document["kind"] == "Pod":
            yield f"Pod/{document['metadata']['name']}", document
        elif document["kind"] == "JobSet":
            for job in document["spec"]["replicatedJobs"]:
                yield f"JobSet/{job['name']}", job["template"]["spec"]["template"]


def containers(template: Document) -> list[Document]:
    """Init containers and containers of a pod template."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def environment(container: Document) -> dict[str, str]:
    """Variables of a container that are stated literally."""
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
