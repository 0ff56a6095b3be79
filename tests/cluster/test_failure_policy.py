"""Each class of the Jobs' failure policy, by the real Job controller on our own manifests, and the verdict on it."""

from __future__ import annotations

import pytest

from rlhf.cluster.api import JOB, Cluster
from rlhf.cluster.documents import Document, component, conditions
from tests.cluster.conftest import LOCAL, Run, overlay_with
from tests.cluster.kubelet import Fate, Kubelet


def job(cluster: Cluster, stage: str) -> Document:
    found = cluster.get(JOB, f"rlhf-{stage}")
    assert found is not None
    return found


@pytest.mark.parametrize(("code", "container"), [(64, "check"), (65, "stage"), (66, "check"), (78, "stage")])
def test_what_does_not_mend_itself_ends_the_job_at_once(
    code: int, container: str, rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys
) -> None:
    line = "rlhf: the policy of sft is missing; run `make deploy-sft` first"
    kubelet.play(cluster.namespace, lambda pod: Fate(code, line, container=container))
    assert rlhf("deploy", "ppo", *LOCAL, "--wait") == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"ppo failed (rlhf-ppo-0, container {container}): exit code {code}: {line}"
    assert conditions(job(cluster, "ppo"))["Failed"]["reason"] == "PodFailurePolicy"
    assert len(kubelet.pods(cluster.namespace)) == 1


def test_retries_are_counted_only_for_what_the_stage_did_wrong(
    rlhf: Run, cluster: Cluster, kubelet: Kubelet, tmp_path, capsys
) -> None:
    once = overlay_with(tmp_path, "Job", {"spec": {"backoffLimit": 1}})
    first = {
        "sft": Fate(75, "rlhf: stopped on request"),
        "reward": Fate(taken_away=True),
        "ppo": Fate(1, "RuntimeError: CUDA error: an illegal memory access"),
    }
    then = {"sft": Fate(0), "reward": Fate(0), "ppo": first["ppo"]}
    tried: set[str] = set()

    def fate(pod: Document) -> Fate:
        stage = component(pod)
        again = stage in tried
        tried.add(stage)
        return then[stage] if again else first[stage]

    kubelet.play(cluster.namespace, fate)
    for stage in ("sft", "reward"):
        assert rlhf("deploy", stage, "--overlay", once) == 0
    assert rlhf("deploy", "ppo", "--overlay", once, "--wait", "--timeout", "60") == 1
    said = capsys.readouterr().err
    assert "another pod tries again (backoffLimit 1)" in said
    expected = "ppo failed after 2 tries (rlhf-ppo-0, container stage): exit code 1: RuntimeError: CUDA error"
    assert said.splitlines()[-1].startswith(expected)
    assert conditions(job(cluster, "ppo"))["Failed"]["reason"] == "BackoffLimitExceeded"
    for stage in ("sft", "reward"):
        assert rlhf("cluster-logs", stage, "--follow") == 0
        assert job(cluster, stage)["status"].get("failed", 0) == 0
    assert (
        sorted(component(pod) for pod in kubelet.pods(cluster.namespace)) == ["ppo"] * 2 + ["reward"] * 2 + ["sft"] * 2
    )


def test_lack_of_memory_is_named(rlhf: Run, cluster: Cluster, kubelet: Kubelet, tmp_path, capsys) -> None:
    never = overlay_with(tmp_path, "Job", {"spec": {"backoffLimit": 0}})
    kubelet.play(cluster.namespace, lambda pod: Fate(137, reason="OOMKilled"))
    assert rlhf("deploy", "ppo", "--overlay", never, "--wait") == 137
    assert "more memory than its limit (OOMKilled): raise the limit" in capsys.readouterr().err


def test_a_deadline_is_named(rlhf: Run, cluster: Cluster, kubelet: Kubelet, tmp_path, capsys) -> None:
    short = overlay_with(tmp_path, "Job", {"spec": {"activeDeadlineSeconds": 2}})
    kubelet.play(cluster.namespace, lambda pod: Fate(None))
    assert rlhf("deploy", "ppo", "--overlay", short, "--wait") == 75
    assert "ran past its activeDeadlineSeconds of 2" in capsys.readouterr().err
