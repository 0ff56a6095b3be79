"""`rlhf deploy all`: in order, safe to interrupt, on from where the cluster is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from rlhf.cluster.api import JOB, Cluster
from rlhf.cluster.documents import Document, component
from rlhf.pipeline import STAGE_NAMES
from tests.cluster.conftest import LOCAL, Run
from tests.cluster.kubelet import Fate, Kubelet
from tests.conftest import REPOSITORY

ALL = ("deploy", "all", *LOCAL, "--timeout", "100")


def uids(cluster: Cluster) -> dict[str, str]:
    return {component(job): str(job["metadata"]["uid"]) for job in cluster.list(JOB)}


def test_the_pipeline_goes_on_where_it_was_interrupted(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    begun: list[str] = []

    def fate(pod: Document) -> Fate:
        stage = component(pod)
        begun.append(stage)
        if stage == "reward" and begun.count("reward") == 1:
            return Fate(None)  # works on while we are interrupted
        if stage == "prepare" and begun.count("prepare") == 1:
            return Fate(65, "rlhf: too many bad rows")
        return Fate(0, lines=(f"this is {stage}",))

    kubelet.play(cluster.namespace, fate)
    interrupted(cluster, kubelet)
    before = uids(cluster)
    assert sorted(before) == ["fetch", "reward", "sft"]

    reward = next(pod for pod in kubelet.pods(cluster.namespace) if component(pod) == "reward")
    kubelet.end(reward, Fate(0))
    assert rlhf(*ALL) == 65
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["[1/6] fetch is done already", "[2/6] sft is done already"]
    assert said[-1] == "prepare failed (rlhf-prepare-0, container stage): exit code 65: rlhf: too many bad rows"

    assert rlhf(*ALL, "--follow") == 0
    printed = capsys.readouterr()
    assert printed.out == "".join(f"this is {stage}\n" for stage in ("prepare", "ppo", "evaluate"))
    assert "[4/6] prepare failed before; trying again" in printed.err
    assert printed.err.splitlines()[-1] == "all stages of run demo are done"
    after = uids(cluster)
    assert {stage: after[stage] for stage in before} == before
    assert begun == [*STAGE_NAMES[:4], "prepare", *STAGE_NAMES[4:]]
    assert rlhf(*ALL) == 0
    assert uids(cluster) == after


def interrupted(cluster: Cluster, kubelet: Kubelet) -> None:
    """`deploy all`, stopped by Ctrl-C while the third stage is at work."""
    command = [sys.executable, "-m", "rlhf", *ALL, "--namespace", cluster.namespace]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("rlhf-reward-0: runs on"):
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 75
    assert "rlhf-reward goes on in the cluster" in said


def test_another_runs_job_is_not_joined(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    assert rlhf("deploy", "fetch", *LOCAL, "--run", "theirs") == 0
    before = uids(cluster)
    assert rlhf(*ALL, "--run", "ours") == 73
    assert "Job rlhf-fetch is active with run 'theirs'" in capsys.readouterr().err.splitlines()[-1]
    assert rlhf(*ALL, "--run", "theirs", "--set", "ppo.iterations=3") == 73
    assert "Job rlhf-fetch is active with other settings" in capsys.readouterr().err.splitlines()[-1]
    assert uids(cluster) == before
    kubelet.play(cluster.namespace, lambda pod: Fate(66 if component(pod) == "sft" else 0))
    assert rlhf(*ALL, "--run", "ours", "--replace") == 66
    assert uids(cluster)["fetch"] != before["fetch"]
