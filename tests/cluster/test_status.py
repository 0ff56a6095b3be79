"""`cluster-status` shows where each stage is, and how the service is reached."""

from __future__ import annotations

import json

from rlhf.cluster.api import DEPLOYMENT, Cluster
from rlhf.cluster.documents import Document, component
from tests.cluster.conftest import LOCAL, Run
from tests.cluster.kubelet import NODE, Fate, Kubelet


def progress(text: str) -> str:
    return json.dumps({"time": "2026-01-02T03:04:05+0000", "level": "INFO", "logger": "x", "message": text})


def test_the_state_of_every_stage(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    line = progress("progress stage=ppo done=3 total=16 unit=iterations seconds_left=120.5 reward=0.41 kl=1.2")
    fates = {
        "fetch": Fate(0),
        "sft": Fate(65, "rlhf: too many bad rows"),
        "ppo": Fate(None, lines=(line, progress("saved step=3"))),
        "api": Fate(None),
    }

    def fate(pod: Document) -> Fate:
        return fates[component(pod)]

    kubelet.play(cluster.namespace, fate)
    assert rlhf("deploy", "fetch", *LOCAL, "--wait") == 0
    assert rlhf("deploy", "sft", *LOCAL, "--wait") == 65
    assert rlhf("deploy", "api", *LOCAL, "--wait", "--timeout", "30") == 0
    assert rlhf("deploy", "ppo", *LOCAL, "--wait", "--timeout", "2") == 69
    assert rlhf("deploy", "reward", *LOCAL, "--gpus", "100", "--wait", "--stuck-after", "1.5") == 69
    capsys.readouterr()
    assert rlhf("cluster-status") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[:7]] == [
        ["stage", "state", "run", "step", "reward", "time", "left", "retries", "node"],
        ["fetch", "done", "demo", "0"],
        ["sft", "failed", "demo", "1"],
        ["reward", "waiting", "demo", "0"],
        ["prepare", "absent"],
        ["ppo", "running", "demo", "3", "of", "16", "iterations", "0.41", "2", "min", "0", "s", "0", NODE],
        ["evaluate", "absent"],
    ]
    assert "sft: sft failed (rlhf-sft-0, container stage): exit code 65: rlhf: too many bad rows" in shown
    assert any(line.startswith("reward: rlhf-reward-0: Unschedulable") for line in shown)
    replicas = cluster.get(DEPLOYMENT, "rlhf-api")["spec"]["replicas"]
    address = f"http://rlhf-api.{cluster.namespace}.svc:8000"
    assert f"api: {replicas} of {replicas} pods ready, {address} in the cluster" in shown
    assert f"  from here: kubectl -n {cluster.namespace} port-forward service/rlhf-api 8000" in shown
    assert shown[-1] == "tensorboard: absent"


def test_a_namespace_without_anything(rlhf: Run, capsys) -> None:
    assert rlhf("cluster-status") == 0
    assert "ppo       absent" in capsys.readouterr().out
    assert rlhf("cluster-logs", "ppo") == 66
    assert rlhf("cluster-logs", "ppo", "--follow") == 66
