"""What `deploy` changes in the documents of an overlay; every function returns new documents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from rlhf.cluster.documents import (
    CONFIG_ANNOTATION,
    CONFIG_KEY,
    CONFIG_MAP,
    ENVIRONMENT_MAP,
    GPU,
    RUN_ANNOTATION,
    RUN_KEY,
    Document,
    component,
    config_data,
    containers,
    identity,
    title,
    variable,
)
from rlhf.errors import ConfigError, UsageError

IMAGE_NAME = "rlhf-summarizer"
NODES_VARIABLE, GPUS_VARIABLE = "RLHF_NODES", "RLHF_GPUS"
TRAINING_STAGES = ("sft", "reward", "ppo")


def with_image(documents: Sequence[Document], image: str) -> list[Document]:
    """Use `image` in every container that runs ours, whatever registry and tag the overlay names."""

    def edit(document: Document) -> None:
        for container in containers(document):
            if repository(container["image"]).rpartition("/")[2].startswith(IMAGE_NAME):
                container["image"] = image

    return _edited(documents, edit)


def check_images(documents: Sequence[Document]) -> None:
    """Raise UsageError for an image that can change under a running stage: no tag and no digest, or `latest`."""
    for document in documents:
        for container in containers(document):
            image = container["image"]
            tag = image.removeprefix(repository(image))
            if tag in ("", ":latest"):
                raise UsageError(
                    f"{title(document)}: image {image!r} names no fixed version; "
                    f"use a tag of your own or a digest: --image {repository(image)}:VERSION"
                )


def repository(image: str) -> str:
    """An image's name without tag and digest; a registry's port is part of it."""
    name = image.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return head + slash + last.partition(":")[0]


def with_namespace(documents: Sequence[Document], namespace: str) -> list[Document]:
    """Move everything to another namespace; what has none, or a foreign one, stays where it is."""
    home = home_namespace(documents)

    def edit(document: Document) -> None:
        metadata = document["metadata"]
        if document["kind"] == "Namespace" and metadata["name"] == home:
            metadata["name"] = namespace
        elif metadata.get("namespace") == home:
            metadata["namespace"] = namespace
            for subject in document.get("subjects", []):
                if subject.get("namespace") == home:
                    subject["namespace"] = namespace

    return _edited(documents, edit)


def home_namespace(documents: Sequence[Document]) -> str:
    """The namespace that the documents live in. Raises ConfigError where they name none, or several for our Jobs."""
    homes = {document["metadata"].get("namespace", "") for document in documents if containers(document)}
    if len(homes) != 1 or "" in homes:
        raise ConfigError(f"the overlay's Jobs and Deployments must name one namespace; they name {sorted(homes)}")
    return str(homes.pop())


def spans_nodes(document: Document) -> bool:
    """Whether a Job may use several nodes: its stage is one that many processes can share."""
    return document["kind"] == "Job" and any(variable(each, NODES_VARIABLE) for each in containers(document))


def trains(document: Document) -> bool:
    """Whether a Job is one of the training stages, for which nodes and GPUs are there first of all."""
    return document["kind"] == "Job" and component(document) in TRAINING_STAGES


def with_nodes(documents: Sequence[Document], nodes: int, *, training_only: bool = False) -> list[Document]:
    """Spread the stages that can be over `nodes` pods; `fetch` keeps its one.

    training_only: so do `prepare` and `evaluate`, as `deploy all` wants.
    """

    def edit(document: Document) -> None:
        if not spans_nodes(document) or (training_only and not trains(document)):
            return
        document["spec"] |= {"completions": nodes, "parallelism": nodes}
        for container in containers(document):
            if entry := variable(container, NODES_VARIABLE):
                entry["value"] = str(nodes)

    return _edited(documents, edit)


def with_gpus(documents: Sequence[Document], gpus: int, *, at_most_own: bool = False) -> list[Document]:
    """Give each pod of the Jobs `gpus` GPUs; 0 takes the request away.

    at_most_own: stages that are no training keep the smaller of their own number and this one, as `deploy all` wants.
    """

    def edit(document: Document) -> None:
        if document["kind"] != "Job":
            return
        for container in containers(document):
            entry = variable(container, GPUS_VARIABLE)
            if entry is None:
                continue
            keep = at_most_own and not trains(document)
            _set_gpus(container, entry, min(gpus, int(entry["value"])) if keep else gpus)

    return _edited(documents, edit)


def _set_gpus(container: Document, entry: Document, gpus: int) -> None:
    entry["value"] = str(gpus)
    for kind in ("requests", "limits"):
        amounts = container.setdefault("resources", {}).setdefault(kind, {})
        amounts.pop(GPU, None)
        if gpus:
            amounts[GPU] = gpus


def with_run(documents: Sequence[Document], run: str) -> list[Document]:
    """Name the run that the stages and the service work on."""
    return _with_data(documents, ENVIRONMENT_MAP, RUN_KEY, run)


def with_config(documents: Sequence[Document], text: str) -> list[Document]:
    """Put a whole configuration, as YAML, in place of the overlay's."""
    return _with_data(documents, CONFIG_MAP, CONFIG_KEY, text)


def with_identity(documents: Sequence[Document]) -> list[Document]:
    """Note on every Job the run and the configuration that the ConfigMaps state, to recognise it by later.

    A service is told the run by its name instead of by the ConfigMap's, which may name another one by the time that
    one of its pods is replaced; a note on its pods makes a new name bring new ones.
    """
    what = identity(documents)

    def edit(document: Document) -> None:
        if document["kind"] == "Job":
            notes = document["metadata"].setdefault("annotations", {})
            notes |= {RUN_ANNOTATION: what.run, CONFIG_ANNOTATION: what.config}
        elif any(variable(container, RUN_KEY) for container in containers(document)):
            metadata = document["spec"]["template"].setdefault("metadata", {})
            metadata.setdefault("annotations", {})[RUN_ANNOTATION] = what.run
            for container in containers(document):
                for entry in container.get("env", []):
                    if "value" in entry:
                        entry["value"] = entry["value"].replace(f"$({RUN_KEY})", what.run)

    return _edited(documents, edit)


def _with_data(documents: Sequence[Document], name: str, key: str, value: str) -> list[Document]:
    if config_data(documents, name) is None:
        raise ConfigError(f"the overlay has no ConfigMap {name} to write {key} into")

    def edit(document: Document) -> None:
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] == name:
            document.setdefault("data", {})[key] = value

    return _edited(documents, edit)


def _edited(documents: Sequence[Document], edit: Callable[[Document], None]) -> list[Document]:
    edited = copy.deepcopy(list(documents))
    for document in edited:
        edit(document)
    return edited
