"""The cluster that the tests use: a control plane of their own, or an existing one."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes import config
from kubernetes.client import ApiClient, Configuration, CoreV1Api

from rlhf.__main__ import main
from rlhf.cluster import snapshot
from rlhf.cluster.api import Cluster
from rlhf.cluster.documents import Document
from rlhf.cluster.kubeconfig import connect
from tests.cluster.control_plane import ADMINISTRATOR, ControlPlane, assets_folder
from tests.cluster.kubelet import Kubelet
from tests.conftest import REPOSITORY

Run = Callable[..., int]
IMAGE = "registry.example.com/rlhf-summarizer:0.1.0-test"
LOCAL = ("--overlay", "local-cpu", "--image", IMAGE)
NUMBERS = itertools.count(1)
HOW = (
    "set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver (`setup-envtest use -p path` brings one), and "
    "kube-controller-manager and kube-scheduler from a Kubernetes release beside them"
)


def existing() -> bool:
    return os.environ.get("USE_EXISTING_CLUSTER", "").lower() == "true"


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of our own."""
    assets = assets_folder()
    if existing():
        pytest.skip("this test plays the kubelet, which an existing cluster has; run it without USE_EXISTING_CLUSTER")
    if assets is None:
        pytest.skip(f"no API server: {HOW}; or USE_EXISTING_CLUSTER=true for the cluster of the kubeconfig")
    plane = ControlPlane(assets, tmp_path_factory.mktemp("plane"))
    # Asked to end, pytest would leave the programs behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def kubeconfig(request: pytest.FixtureRequest) -> Path:
    """The administrator's kubeconfig, of our own control plane or of the existing cluster."""
    if existing():
        return Path(os.environ.get("KUBECONFIG", "~/.kube/config")).expanduser()
    plane: ControlPlane = request.getfixturevalue("plane")
    return plane.kubeconfig(ADMINISTRATOR)


@pytest.fixture(scope="session")
def administrator(kubeconfig: Path) -> Iterator[ApiClient]:
    """The official client, with all rights."""
    settings = Configuration()
    config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings, persist_config=False)
    client = ApiClient(settings)
    yield client
    client.close()


@pytest.fixture(scope="session")
def node(plane: ControlPlane, administrator: ApiClient) -> Iterator[Kubelet]:
    """A node that does what tests say, with the real Job controller and scheduler."""
    for program in ("kube-controller-manager", "kube-scheduler"):
        if not plane.has(program):
            pytest.skip(f"no {program} in KUBEBUILDER_ASSETS: {HOW}")
    kubelet = Kubelet(administrator, plane.certificate())
    kubelet.start()
    yield kubelet
    kubelet.stop()


@pytest.fixture(scope="session")
def controllers(request: pytest.FixtureRequest) -> None:
    """The cluster's own Job controller and scheduler, and a node."""
    if not existing():
        request.getfixturevalue("node")


@pytest.fixture
def namespace(administrator: ApiClient) -> Iterator[str]:
    """A name for a namespace of this test; an existing cluster gets rid of it afterwards."""
    name = f"rlhf-test-{os.getpid()}-{next(NUMBERS)}"
    yield name
    api = CoreV1Api(administrator)
    if existing() and name in [each.metadata.name for each in api.list_namespace().items]:
        api.delete_namespace(name)


@pytest.fixture
def kubelet(node: Kubelet, namespace: str, administrator: ApiClient) -> Iterator[Kubelet]:
    """The node, with a volume for this test's namespace."""
    api = CoreV1Api(administrator)
    api.create_persistent_volume(
        {
            "metadata": {"name": namespace},
            "spec": {
                "capacity": {"storage": "2Ti"},
                "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                "hostPath": {"path": "/nowhere"},
                "claimRef": {"namespace": namespace, "name": "rlhf-runs"},
            },
        }
    )
    node.namespaces = {namespace}
    yield node
    node.namespaces, node.fates = set(), {}
    node.holds.clear()


@pytest.fixture
def warned() -> list[str]:
    """What the server warned of."""
    return []


@pytest.fixture
def cluster(kubeconfig: Path, namespace: str, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Our own client in this test's namespace."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    if assets := assets_folder():  # envtest brings a kubectl, too
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{assets}")
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl: it renders the overlays; install version 1.29 or newer")
    monkeypatch.setattr(snapshot, "LOOK_EVERY_SECONDS", 0.2)
    cluster = connect(None, namespace, warned.append)
    yield cluster
    cluster.close()


@pytest.fixture
def rlhf(cluster: Cluster) -> Callable[..., int]:
    """Runs one of our commands in this test's namespace; its exit code."""

    def run(*arguments: str) -> int:
        return main([*arguments, "--namespace", cluster.namespace])

    return run


@pytest.fixture
def kubectl(kubeconfig: Path, cluster: Cluster) -> Callable[..., str]:
    """Runs kubectl in this test's namespace; what it prints."""

    def run(*arguments: str, stdin: str = "") -> str:
        command = ["kubectl", f"--kubeconfig={kubeconfig}", f"--namespace={cluster.namespace}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout

    return run


def overlay_with(folder: Path, kind: str, patch: Document) -> str:
    """An overlay in `folder`: local-cpu with a change of every object of a kind."""
    document = {"apiVersion": "batch/v1", "kind": kind, "metadata": {"name": "any"}, **patch}
    (folder / "patch.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    base = os.path.relpath(REPOSITORY / "k8s" / "overlays" / "local-cpu", folder)
    patches = [{"path": "patch.yaml", "target": {"kind": kind}}]
    text = yaml.safe_dump({"resources": [base], "patches": patches})
    (folder / "kustomization.yaml").write_text(text, encoding="utf-8")
    return str(folder)
