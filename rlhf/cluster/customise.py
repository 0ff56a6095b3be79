"""An overlay with the changes that a command line asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.checkpoint import run_directory
from rlhf.cluster.documents import CONFIG_KEY, CONFIG_MAP, SHARED, Document, belonging, config_data, title, workload
from rlhf.cluster.edits import (
    check_images,
    spans_nodes,
    with_config,
    with_gpus,
    with_identity,
    with_image,
    with_namespace,
    with_nodes,
    with_run,
)
from rlhf.errors import UsageError
from rlhf.presets import load_config


@dataclass(frozen=True)
class Changes:
    """What differs from the overlay; None leaves what it says. config and overrides are --config and --set."""

    image: str | None = None
    namespace: str | None = None
    run: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()


def customised(documents: Sequence[Document], parts: Sequence[str], changes: Changes) -> list[Document]:
    """The shared documents and those of `parts`, changed.

    Raises UsageError for a part that the overlay lacks, a change that means nothing to the parts, and an image
    without a fixed version; ConfigError for a wrong configuration.
    """
    wanted = [document for part in (SHARED, *parts) for document in belonging(documents, part)]
    jobs = [_workload(documents, part) for part in parts]
    pipeline = len(parts) > 1
    if changes.image:
        wanted = with_image(wanted, changes.image)
    if changes.run:
        run_directory(Path(), changes.run)
        wanted = with_run(wanted, changes.run)
    if changes.config or changes.overrides:
        wanted = with_config(wanted, _config_text(wanted, changes))
    if changes.nodes is not None:
        _check_number("--nodes", changes.nodes, 1, any(spans_nodes(job) for job in jobs), "stages that nodes can share")
        wanted = with_nodes(wanted, changes.nodes, training_only=pipeline)
    if changes.gpus is not None:
        _check_number("--gpus", changes.gpus, 0, any(job["kind"] == "Job" for job in jobs), "stages")
        wanted = with_gpus(wanted, changes.gpus, at_most_own=pipeline)
    if changes.namespace:
        wanted = with_namespace(wanted, changes.namespace)
    check_images(wanted)
    return with_identity(wanted)


def _workload(documents: Sequence[Document], part: str) -> Document:
    found = workload(documents, part)
    if found is None:
        others = [title(document) for document in documents if document["kind"] == "JobSet"]
        remedy = f"it has {others[0]}: apply it with `kubectl apply -k`" if others else "choose another overlay"
        raise UsageError(f"the overlay has no Job or Deployment for {part}; {remedy}")
    return found


def _check_number(option: str, number: int, least: int, meant: bool, of_whom: str) -> None:
    if number < least:
        raise UsageError(f"{option} {number} is less than {least}")
    if not meant:
        raise UsageError(f"{option} is for {of_whom}; leave it out here, and change the overlay if need be")


def _config_text(documents: Sequence[Document], changes: Changes) -> str:
    """The resolved configuration: --config with --set, or --set on what the overlay has."""
    if changes.config:
        return load_config(changes.config, changes.overrides).to_yaml()
    text = (config_data(documents, CONFIG_MAP) or {}).get(CONFIG_KEY, "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{CONFIG_MAP}.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(str(path), changes.overrides).to_yaml()
