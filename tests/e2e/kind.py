"""Which cluster is worked on: the one that kubectl reaches, or one that kind makes for the time of the tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NAME = "rlhf-e2e"
CREATE_SECONDS, LOAD_SECONDS, DELETE_SECONDS, ASK_SECONDS = 600, 600, 120, 30


class NoCluster(Exception):
    """There is no cluster to work on; says what is missing."""


@contextmanager
def cluster(environment: Mapping[str, str], image: str, scratch: Path) -> Iterator[dict[str, str]]:
    """The environment in which kubectl reaches a cluster that has `image`.

    That of KUBECONFIG, or of the current context, is used as it is: whoever names it puts the image there.
    Raises NoCluster where there is none and none can be made.
    """
    if answers(environment):
        yield dict(environment)
        return
    check_kind(environment, image)
    kubeconfig = scratch / "kubeconfig"
    try:
        create = ("kind", "create", "cluster", "--name", NAME, "--kubeconfig", str(kubeconfig), "--wait", "180s")
        told(environment, *create, seconds=CREATE_SECONDS)
        told(environment, "kind", "load", "docker-image", image, "--name", NAME, seconds=LOAD_SECONDS)
        yield {**environment, "KUBECONFIG": str(kubeconfig)}
    finally:
        delete = ("kind", "delete", "cluster", "--name", NAME, "--kubeconfig", str(kubeconfig))
        told(environment, *delete, seconds=DELETE_SECONDS)


def answers(environment: Mapping[str, str]) -> bool:
    """Whether kubectl reaches a cluster."""
    return works(environment, "kubectl", "get", "--raw", "/version", "--request-timeout=10s")


def check_kind(environment: Mapping[str, str], image: str) -> None:
    """Raise NoCluster when kind, a running Docker or the image is missing, or a cluster of ours is left over."""
    no_cluster = "kubectl reaches no cluster (set KUBECONFIG), and none can be made with kind:"
    for tool in ("kind", "docker"):
        if shutil.which(tool, path=environment.get("PATH")) is None:
            raise NoCluster(f"{no_cluster} {tool} is not on the PATH")
    if not works(environment, "docker", "info"):
        raise NoCluster(f"{no_cluster} Docker is not running")
    if not works(environment, "docker", "image", "inspect", image):
        raise NoCluster(f"{no_cluster} Docker has no image {image}; `make image ACCELERATOR=cpu` builds it")
    if NAME in told(environment, "kind", "get", "clusters", seconds=ASK_SECONDS).split():
        raise NoCluster(
            f"{no_cluster} one named {NAME} is there already; use it with `kind export kubeconfig --name {NAME}`, "
            f"or `kind delete cluster --name {NAME}`"
        )


def works(environment: Mapping[str, str], *command: str) -> bool:
    """Whether a command ends well and soon."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, env=dict(environment), timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def told(environment: Mapping[str, str], *command: str, seconds: float) -> str:
    """What a command prints. Raises NoCluster with its words when it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(environment), timeout=seconds)
    if done.returncode:
        raise NoCluster(f"`{' '.join(command)}` ended with {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout
