"""`rlhf deploy api`: waits for the rollout, names a crash, and brings new pods where they are needed."""

from __future__ import annotations

import threading

import pytest

from rlhf.cluster.api import DEPLOYMENT, Cluster
from rlhf.cluster.documents import Document
from tests.cluster.conftest import LOCAL, Run
from tests.cluster.kubelet import Fate, Kubelet

WAIT = ("--wait", "--timeout", "30")


def template(cluster: Cluster) -> Document:
    found = cluster.get(DEPLOYMENT, "rlhf-api")
    assert found is not None
    return dict(found["spec"]["template"])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_service_that_starts_again_and_again(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    line = "rlhf: /runs/demo/ppo has no finished checkpoint; run `make deploy-ppo` first"

    def crash() -> None:
        (pod,) = kubelet.wait_for_pods(cluster.namespace)
        for count in range(3):
            kubelet.crash(pod, "api", count, 66, line)
            done.wait(2)

    done = threading.Event()
    thread = threading.Thread(target=crash)
    thread.start()
    assert rlhf("deploy", "api", *LOCAL, *WAIT) == 66
    done.set()
    thread.join()
    said = last_line(capsys)
    assert "starts again and again" in said
    assert said.endswith(f"exit code 66: {line}")

    (crashing,) = kubelet.wait_for_pods(cluster.namespace)

    def fate(pod: Document) -> Fate | None:
        return None if pod["metadata"]["name"] == crashing["metadata"]["name"] else Fate(None)

    kubelet.play(cluster.namespace, fate)  # what it lacked is there now; the old pod waits for minutes
    assert rlhf("deploy", "api", *LOCAL, *WAIT) == 0
    (serving,) = kubelet.wait_for_pods(cluster.namespace)
    assert serving["metadata"]["name"] != crashing["metadata"]["name"]
    mended = template(cluster)
    assert rlhf("deploy", "api", *LOCAL, *WAIT) == 0
    assert template(cluster) == mended


def test_another_run_brings_other_pods(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    kubelet.play(cluster.namespace, lambda pod: Fate(None))
    assert rlhf("deploy", "api", *LOCAL, *WAIT, "--follow") == 0
    replicas = len(kubelet.pods(cluster.namespace))
    assert last_line(capsys) == f"api is ready: {replicas} of {replicas} pods"
    before = template(cluster)
    assert rlhf("deploy", "api", *LOCAL, *WAIT) == 0
    assert template(cluster) == before
    assert rlhf("deploy", "api", *LOCAL, *WAIT, "--run", "second") == 0
    assert template(cluster) != before
