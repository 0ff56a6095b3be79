"""Kubernetes objects as plain dictionaries: what of them this project names, and small questions about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]

NAMESPACE = "rlhf"
SERVICES = ("api", "tensorboard")
PART_OF = "app.kubernetes.io/part-of=rlhf-summarizer"
COMPONENT = "app.kubernetes.io/component"
SHARED = "shared"
RUN_ANNOTATION = "rlhf.summarizer/run"
CONFIG_ANNOTATION = "rlhf.summarizer/config"
CONFIG_MAP, CONFIG_KEY = "rlhf-config", "config.yaml"
ENVIRONMENT_MAP, RUN_KEY = "rlhf-environment", "RLHF_RUN"
GPU = "nvidia.com/gpu"
WORKLOADS = ("Job", "Deployment")


@dataclass(frozen=True)
class Identity:
    """What a Job works on: a run, and a digest of the configuration that it was given."""

    run: str
    config: str


def workload_name(part: str) -> str:
    """What the Job of a stage, or the Deployment and the Service of a service, are called."""
    return f"rlhf-{part}"


def title(document: Document) -> str:
    """`Job/rlhf-ppo`, as kubectl names it."""
    return f"{document['kind']}/{document['metadata']['name']}"


def component(document: Document) -> str:
    """The stage or service that a document belongs to; `shared` where it does not say."""
    return str(document["metadata"].get("labels", {}).get(COMPONENT, SHARED))


def belonging(documents: Iterable[Document], part: str) -> list[Document]:
    """The documents of one stage or service, or the shared ones."""
    return [document for document in documents if component(document) == part]


def workload(documents: Iterable[Document], part: str) -> Document | None:
    """The Job or Deployment of a stage or service."""
    return next((found for found in belonging(documents, part) if found["kind"] in WORKLOADS), None)


def containers(document: Document) -> list[Document]:
    """All containers of a Job or Deployment, init containers first; none for other kinds."""
    if document["kind"] not in WORKLOADS:
        return []
    pod = document["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def variable(container: Document, name: str) -> Document | None:
    """The entry of an environment variable that a container names itself."""
    return next((entry for entry in container.get("env", []) if entry["name"] == name), None)


def config_data(documents: Iterable[Document], name: str) -> dict[str, str] | None:
    """What a ConfigMap holds; None where there is none of that name."""
    for document in documents:
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] == name:
            return dict(document.get("data") or {})
    return None


def identity(documents: Sequence[Document]) -> Identity:
    """The run and the configuration that the ConfigMaps state."""
    run = (config_data(documents, ENVIRONMENT_MAP) or {}).get(RUN_KEY, "")
    config = (config_data(documents, CONFIG_MAP) or {}).get(CONFIG_KEY, "")
    return Identity(run, hashlib.sha256(config.encode()).hexdigest()[:16])


def job_identity(job: Document) -> Identity:
    """What `deploy` wrote on a Job; empty for one that was applied by other means."""
    notes = job["metadata"].get("annotations") or {}
    return Identity(notes.get(RUN_ANNOTATION, ""), notes.get(CONFIG_ANNOTATION, ""))


def conditions(document: Document) -> dict[str, Document]:
    """The conditions of a status that are true, by type."""
    listed = (document.get("status") or {}).get("conditions") or []
    return {entry["type"]: entry for entry in listed if entry.get("status") == "True"}
