"""`rlhf deploy` and `undeploy` on a real API server, with its own Job controller."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import yaml

from rlhf.cluster.api import CLAIM, CONFIG, JOB, POD, SERVICE, Cluster, Kind
from rlhf.cluster.documents import COMPONENT, CONFIG_ANNOTATION, RUN_ANNOTATION, Document
from rlhf.presets import load_config
from tests.cluster.conftest import IMAGE, LOCAL, Run, overlay_with
from tests.cluster.kubelet import Fate, Kubelet


def job(cluster: Cluster, stage: str) -> Document:
    found = cluster.get(JOB, f"rlhf-{stage}")
    assert found is not None
    return found


def uid(cluster: Cluster, stage: str) -> str:
    return str(job(cluster, stage)["metadata"]["uid"])


def test_a_job_says_which_run_and_configuration_it_works_on(rlhf: Run, cluster: Cluster) -> None:
    assert rlhf("deploy", "ppo", *LOCAL, "--run", "second", "--set", "ppo.iterations=3", "--nodes", "2") == 0
    made, config = job(cluster, "ppo"), cluster.get(CONFIG, "rlhf-config")
    assert made["metadata"]["annotations"][RUN_ANNOTATION] == "second"
    assert config["data"]["config.yaml"] == load_config("demo", ["ppo.iterations=3"]).to_yaml()
    assert cluster.get(CONFIG, "rlhf-environment")["data"]["RLHF_RUN"] == "second"
    assert (made["spec"]["completions"], made["spec"]["parallelism"]) == (2, 2)
    pod = made["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["image"] == IMAGE
        assert {"name": "RLHF_NODES", "value": "2"} in container["env"]
    managers = {entry["manager"]: entry["operation"] for entry in made["metadata"]["managedFields"]}
    assert managers["rlhf-deploy"] == "Apply"


def test_an_active_job_is_refused_with_what_to_do(rlhf: Run, cluster: Cluster, capsys) -> None:
    assert rlhf("deploy", "sft", *LOCAL) == 0
    before = uid(cluster, "sft")
    assert rlhf("deploy", "sft", *LOCAL) == 73
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Job rlhf-sft is active" in said
    assert "make cluster-logs STAGE=sft" in said
    assert "--replace" in said
    assert uid(cluster, "sft") == before


def test_a_suspended_job_is_active(rlhf: Run, kubectl: Callable[..., str], cluster: Cluster) -> None:
    rlhf("deploy", "sft", *LOCAL)
    kubectl("patch", "job", "rlhf-sft", "-p", '{"spec": {"suspend": true}}')
    assert rlhf("deploy", "sft", *LOCAL) == 73


def test_a_finished_job_is_replaced(rlhf: Run, cluster: Cluster, kubelet: Kubelet) -> None:
    kubelet.play(cluster.namespace, lambda pod: Fate(0))
    assert rlhf("deploy", "fetch", *LOCAL, "--wait") == 0
    before = uid(cluster, "fetch")
    kubelet.play(cluster.namespace, lambda pod: Fate(66, "rlhf: nothing there", container="check"))
    assert rlhf("deploy", "fetch", *LOCAL, "--wait") == 66
    failed = uid(cluster, "fetch")
    kubelet.play(cluster.namespace, lambda pod: Fate(0))
    assert rlhf("deploy", "fetch", *LOCAL, "--wait") == 0
    assert len({before, failed, uid(cluster, "fetch")}) == 3


def test_replace_waits_until_the_old_pods_are_gone(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    rlhf("deploy", "ppo", *LOCAL)
    (old,) = kubelet.wait_for_pods(cluster.namespace)
    kubelet.begin(old)
    kubelet.holds.set()  # the pod has got its SIGTERM, and still saves
    codes: list[int] = []
    seen: list[tuple[list[Document], list[int]]] = []

    def look() -> None:
        seen.append((kubelet.pods(cluster.namespace), list(codes)))
        kubelet.holds.clear()

    timer = threading.Timer(4, look)
    timer.start()
    codes.append(rlhf("deploy", "ppo", *LOCAL, "--replace"))
    timer.join()
    assert codes == [0]
    (([pod], codes_then),) = seen
    assert codes_then == []
    assert pod["metadata"]["uid"] == old["metadata"]["uid"]
    assert "deletionTimestamp" in pod["metadata"]
    (new,) = kubelet.wait_for_pods(cluster.namespace)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert "waiting until its pods have saved and are gone" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["prepare", "evaluate"])
def test_a_stage_that_does_not_train_may_be_several_pods(
    rlhf: Run, cluster: Cluster, kubelet: Kubelet, stage: str
) -> None:
    assert rlhf("deploy", stage, *LOCAL, "--nodes", "2") == 0
    pods = kubelet.wait_for_pods(cluster.namespace, 2)
    assert sorted(pod["spec"]["hostname"] for pod in pods) == [f"rlhf-{stage}-0", f"rlhf-{stage}-1"]
    (service,) = cluster.list(SERVICE, labels=f"{COMPONENT}={stage}")
    assert {pod["spec"]["subdomain"] for pod in pods} == {service["metadata"]["name"]}
    assert service["spec"]["selector"].items() <= pods[0]["metadata"]["labels"].items()


def test_a_job_that_is_being_deleted_is_waited_for(rlhf: Run, cluster: Cluster, kubelet: Kubelet) -> None:
    rlhf("deploy", "ppo", *LOCAL)
    (old,) = kubelet.wait_for_pods(cluster.namespace)
    kubelet.begin(old)
    kubelet.holds.set()
    before = job(cluster, "ppo")
    cluster.delete(before, propagation="Foreground")
    timer = threading.Timer(2, kubelet.holds.clear)
    timer.start()
    assert rlhf("deploy", "ppo", *LOCAL) == 0
    timer.join()
    assert uid(cluster, "ppo") != before["metadata"]["uid"]


def test_what_a_job_at_work_would_read_is_not_changed(rlhf: Run, cluster: Cluster, capsys) -> None:
    rlhf("deploy", "sft", *LOCAL, "--run", "first")
    assert rlhf("deploy", "fetch", *LOCAL, "--run", "second") == 73
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Job rlhf-sft is active and shares ConfigMap rlhf-environment" in said
    assert cluster.get(CONFIG, "rlhf-environment")["data"]["RLHF_RUN"] == "first"
    assert cluster.get(JOB, "rlhf-fetch") is None
    assert rlhf("deploy", "fetch", *LOCAL, "--run", "first") == 0


@pytest.mark.usefixtures("controllers")
def test_a_field_that_somebody_else_set_is_theirs(
    rlhf: Run, cluster: Cluster, kubectl: Callable[..., str], capsys
) -> None:
    rlhf("deploy", "fetch", *LOCAL)
    patch = '{"data": {"RLHF_RUN": "mine"}}'
    kubectl("patch", "configmap", "rlhf-environment", "--field-manager=somebody", "-p", patch)
    before = uid(cluster, "fetch")
    assert rlhf("deploy", "fetch", *LOCAL, "--replace") == 73
    assert "data.RLHF_RUN was set by somebody" in capsys.readouterr().err
    assert uid(cluster, "fetch") == before
    assert rlhf("deploy", "fetch", *LOCAL, "--replace", "--force-conflicts") == 0
    assert cluster.get(CONFIG, "rlhf-environment")["data"]["RLHF_RUN"] == "demo"


def test_what_kubectl_applied_is_taken_over(rlhf: Run, cluster: Cluster, kubectl: Callable[..., str]) -> None:
    kubectl("create", "namespace", cluster.namespace)
    data = {"RLHF_RUN": "other"}
    metadata = {"name": "rlhf-environment", "namespace": cluster.namespace}
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(document))
    assert rlhf("deploy", "fetch", *LOCAL) == 0
    assert cluster.get(CONFIG, "rlhf-environment")["data"]["RLHF_RUN"] == "demo"


def test_a_dry_run_changes_nothing_and_is_checked(
    rlhf: Run, cluster: Cluster, capsys, kubectl: Callable[..., str]
) -> None:
    kubectl("create", "namespace", cluster.namespace)
    assert rlhf("deploy", "all", *LOCAL, "--dry-run") == 0
    printed = capsys.readouterr()
    jobs = [document for document in yaml.safe_load_all(printed.out) if document["kind"] == "Job"]
    assert len(jobs) == 6
    assert CONFIG_ANNOTATION in jobs[0]["metadata"]["annotations"]
    assert "the server would accept it" in printed.err
    assert cluster.list(JOB) == []
    assert cluster.get(CLAIM, "rlhf-runs") is None


def test_an_overlay_that_the_server_refuses_changes_nothing(
    rlhf: Run, cluster: Cluster, tmp_path, capsys, kubectl
) -> None:
    rlhf("deploy", "sft", *LOCAL)
    before = uid(cluster, "sft")
    wrong = overlay_with(tmp_path, "Job", {"spec": {"activeDeadlineSeconds": -5}})
    assert rlhf("deploy", "sft", "--overlay", wrong, "--replace") == 78
    assert "Job/rlhf-sft" in capsys.readouterr().err
    assert uid(cluster, "sft") == before


def test_undeploy_leaves_the_volume_and_the_namespace(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    rlhf("deploy", "ppo", *LOCAL)
    rlhf("deploy", "api", *LOCAL)
    for pod in kubelet.wait_for_pods(cluster.namespace, 2):
        kubelet.begin(pod)
    claim = cluster.get(CLAIM, "rlhf-runs")
    assert rlhf("undeploy") == 0
    said = capsys.readouterr().err
    kinds = [Kind("apps/v1", "Deployment"), JOB, Kind("v1", "Service"), Kind("networking.k8s.io/v1", "NetworkPolicy")]
    assert [cluster.list(kind) for kind in kinds] == [[], [], [], []]
    assert [p for p in cluster.list(POD) if "stage" in [c["name"] for c in p["spec"]["containers"]]] == []
    assert cluster.get(CLAIM, "rlhf-runs")["metadata"]["uid"] == claim["metadata"]["uid"]
    assert "deletionTimestamp" not in cluster.get(CLAIM, "rlhf-runs")["metadata"]
    assert f"kubectl -n {cluster.namespace} delete pvc rlhf-runs" in said
    assert rlhf("undeploy") == 0
