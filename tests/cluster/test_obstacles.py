"""What stands in a Job's way is told in the words of the scheduler, the kubelet and the admission controllers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rlhf.cluster.api import CLAIM, JOB, Cluster
from tests.cluster.conftest import LOCAL, Run, overlay_with
from tests.cluster.kubelet import Kubelet

STUCK = ("--wait", "--stuck-after", "2")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_gpus_that_no_node_has(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    assert rlhf("deploy", "ppo", *LOCAL, "--gpus", "1000", *STUCK) == 69
    said = last_line(capsys)
    assert "rlhf-ppo-0: Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu" in said
    assert "(a pod asks for nvidia.com/gpu: 1k, cpu: 500m, memory: 1Gi)" in said
    assert "[for 2 seconds; rlhf-ppo stays, and goes on once this is mended]" in said
    assert cluster.get(JOB, "rlhf-ppo") is not None


@pytest.mark.usefixtures("node")
def test_a_volume_that_nothing_provides(rlhf: Run, cluster: Cluster, capsys) -> None:
    assert rlhf("deploy", "fetch", *LOCAL, *STUCK) == 69
    said = capsys.readouterr().err
    assert "rlhf-fetch-0: Unschedulable: 0/1 nodes are available: pod has unbound immediate PersistentVolumeCl" in said
    assert "PersistentVolumeClaim rlhf-runs: is Pending: no persistent volumes available for this claim and no" in said
    assert "storage class is set (asks for ReadWriteOnce, the default storage class)" in said
    assert cluster.get(CLAIM, "rlhf-runs")["status"]["phase"] == "Pending"


def test_an_image_that_cannot_be_pulled(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    def fail() -> None:
        (pod,) = kubelet.wait_for_pods(cluster.namespace)
        kubelet.wait_with(pod, "check", "ErrImagePull", "manifest unknown")
        kubelet.wait_with(pod, "check", "ImagePullBackOff", "Back-off pulling image: ErrImagePull: manifest unknown")

    thread = threading.Thread(target=fail)
    thread.start()
    assert rlhf("deploy", "fetch", *LOCAL, *STUCK) == 69
    thread.join()
    said = last_line(capsys)
    assert (
        "image registry.example.com/rlhf-summarizer:0.1.0-test cannot be had (ImagePullBackOff): manifest unkn" in said
    )


@pytest.mark.usefixtures("controllers")
def test_a_quota(rlhf: Run, cluster: Cluster, kubectl: Callable[..., str], capsys) -> None:
    kubectl("create", "namespace", cluster.namespace)
    kubectl("create", "quota", "few", "--hard=pods=0")
    assert rlhf("deploy", "fetch", *LOCAL, *STUCK) == 69
    expected = (
        "rlhf-fetch: pods cannot be created: pods is forbidden: exceeded quota: few, requested: pods=1, used: pods=0"
    )
    assert expected in last_line(capsys)


@pytest.mark.usefixtures("controllers")
def test_an_admission_denial(rlhf: Run, cluster: Cluster, tmp_path, capsys) -> None:
    pod = {"template": {"spec": {"hostNetwork": True}}}
    overlay = overlay_with(tmp_path, "Job", {"spec": pod})
    assert rlhf("deploy", "fetch", "--overlay", overlay, *STUCK) == 69
    said = capsys.readouterr().err
    assert (
        'the cluster warns: would violate PodSecurity "restricted:latest": host namespaces (hostNetwork=true)' in said
    )
    assert (
        'pods cannot be created: pods is forbidden: violates PodSecurity "restricted:latest"' in said.splitlines()[-1]
    )


def test_a_queue_is_no_obstacle_but_time_may_be_up(rlhf: Run, cluster: Cluster, tmp_path, capsys) -> None:
    labels = {"metadata": {"name": "any", "labels": {"kueue.x-k8s.io/queue-name": "rlhf"}}, "spec": {"suspend": True}}
    overlay = overlay_with(tmp_path, "Job", labels)
    assert rlhf("deploy", "fetch", "--overlay", overlay, "--wait", "--stuck-after", "1", "--timeout", "3") == 69
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "waits in Kueue's queue 'rlhf'" in line]
    assert said[-1].startswith("rlhf: time is up (--timeout): rlhf-fetch goes on in the cluster")
