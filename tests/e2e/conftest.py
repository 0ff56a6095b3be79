"""The cluster, the namespaces of the tests in it, and the run that most of them look at.

The overlay is local-cpu, made for one node; on several, the default storage class must offer volumes that all can use.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e import kind
from tests.e2e.place import Ended, Place

HOW_TO_RUN = (
    "needs a cluster, and minutes: `make e2e`, with KUBECONFIG or with kind and Docker; RLHF_IMAGE names the image"
)
IMAGE = "rlhf-summarizer:0.1.0-cpu"
OURS = ("RLHF_", "APP_", "JOB_COMPLETION_INDEX")


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str]]:
    """The environment in which kubectl reaches the cluster, and the image."""
    if os.environ.get("RLHF_E2E") != "1":
        pytest.skip(HOW_TO_RUN)
    if shutil.which("kubectl") is None:
        pytest.fail("kubectl is not on the PATH: https://kubernetes.io/docs/tasks/tools/", pytrace=False)
    image = os.environ.get("RLHF_IMAGE", IMAGE)
    # What this shell says about runs and the service must not reach the commands that are tried.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    with kind.cluster(plain, image, tmp_path_factory.mktemp("kind")) as environment:
        yield environment, image


@contextmanager
def _own_namespace(cluster: tuple[dict[str, str], str]) -> Iterator[Place]:
    """A namespace that `deploy` creates, and that is gone with its volume afterwards."""
    environment, image = cluster
    place = Place(f"rlhf-e2e-{secrets.token_hex(4)}", image, environment)
    try:
        yield place
    finally:
        # Pods first: the namespace's controller looks again only after half the longest grace period of those it finds.
        place.kubectl("delete", "jobs,deployments,pods", "--all", "--cascade=foreground", "--timeout=240s")
        place.kubectl("delete", "namespace", place.namespace, "--ignore-not-found", "--timeout=240s")


@pytest.fixture(scope="session")
def place(_cluster: tuple[dict[str, str], str]) -> Iterator[Place]:
    """The namespace of the pipeline and the service."""
    with _own_namespace(_cluster) as place:
        yield place


@pytest.fixture(scope="module")
def empty_place(_cluster: tuple[dict[str, str], str]) -> Iterator[Place]:
    """A namespace in which nothing has been run."""
    with _own_namespace(_cluster) as place:
        yield place


@pytest.fixture(scope="session")
def finished(place: Place) -> Ended:
    """`deploy all`, ended well: the run `demo` of six stages is on the volume."""
    ended = place.deploy("all", "--wait")
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="session")
def service(place: Place, finished: Ended) -> Ended:
    """`deploy api` on that run, ended well, and a pod from which it can be called."""
    ended = place.deploy("api", "--wait")
    assert ended.code == 0, ended.err
    place.apply(Path(__file__).with_name("caller.yaml"))
    place.kubectl("wait", "--for=condition=Ready", "pod/rlhf-caller", "--timeout=180s")
    return ended


@pytest.fixture(autouse=True)
def _what_the_cluster_says(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a failure: the Jobs, pods and events of the namespaces that the test used."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        return
    for name in {"place", "empty_place"}.intersection(request.fixturenames):
        used: Place = request.getfixturevalue(name)
        for what in (("jobs",), ("pods", "--output", "wide"), ("events", "--sort-by", ".metadata.creationTimestamp")):
            sys.stderr.write(used.kubectl("get", *what) + "\n")
