"""Following a Job's logs through all that happens to pods, connections and the API server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

from rlhf.cluster.api import Cluster
from tests.cluster.conftest import LOCAL, Run
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Fate, Kubelet
from tests.conftest import REPOSITORY


def test_the_log_of_both_containers_is_shown_to_the_last_line(
    rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys
) -> None:
    def fate(pod) -> Fate:
        kubelet.logs.write(pod["metadata"]["name"], "check", "all is there")
        return Fate(0, lines=("one", "", "two | half", "ünicode"))

    kubelet.play(cluster.namespace, fate)
    assert rlhf("deploy", "fetch", *LOCAL, "--follow") == 0
    printed = capsys.readouterr()
    assert printed.out == "all is there\none\n\ntwo | half\nünicode\n"
    assert printed.err.splitlines()[-1] == "fetch is done"
    assert rlhf("cluster-logs", "fetch", "--tail", "2") == 0
    assert capsys.readouterr().out == "all is there\ntwo | half\nünicode\n"


def test_no_line_is_lost_or_doubled_through_cuts_and_a_restart_of_the_server(
    rlhf: Run, cluster: Cluster, kubelet: Kubelet, plane: ControlPlane, capsys
) -> None:
    rlhf("deploy", "ppo", *LOCAL)
    (pod,) = kubelet.wait_for_pods(cluster.namespace)
    kubelet.begin(pod)
    name, lines = pod["metadata"]["name"], [f"step {number}" for number in range(220)]

    def write() -> None:
        for number, line in enumerate(lines):
            kubelet.logs.write(name, "stage", line)
            time.sleep(0.02)
            if number in (50, 120):
                kubelet.logs.cut()
            if number == 160:
                plane.kill_server()
                threading.Timer(2.5, plane.start_server).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                return kubelet.end(pod, Fate(0))
            except (ApiException, HTTPError):
                assert time.monotonic() < deadline
                time.sleep(0.5)

    writer = threading.Thread(target=write)
    writer.start()
    assert rlhf("cluster-logs", "ppo", "--follow") == 0
    writer.join()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == lines
    assert "does not answer" in printed.err
    assert kubelet.logs.opened > 3


def test_the_pod_that_replaces_another_is_followed(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    def life() -> None:
        (first,) = kubelet.wait_for_pods(cluster.namespace)
        kubelet.begin(first)
        kubelet.logs.write(first["metadata"]["name"], "stage", "first pod")
        time.sleep(1.5)
        kubelet.evict(first)
        (second,) = kubelet.wait_for_pods(cluster.namespace)
        kubelet.begin(second)
        kubelet.logs.write(second["metadata"]["name"], "stage", "second pod")
        kubelet.end(second, Fate(0))

    thread = threading.Thread(target=life)
    thread.start()
    assert rlhf("deploy", "ppo", *LOCAL, "--follow", "--timeout", "60") == 0
    thread.join()
    printed = capsys.readouterr()
    assert printed.out == "first pod\nsecond pod\n"
    assert "rlhf-ppo-0: is taken away (EvictionByEvictionAPI: Eviction API: evicting)" in printed.err


def test_lines_of_several_pods_say_whose_they_are(rlhf: Run, cluster: Cluster, kubelet: Kubelet, capsys) -> None:
    kubelet.play(cluster.namespace, lambda pod: Fate(0, lines=(f"rank {pod['spec']['hostname'][-1]}",)))
    assert rlhf("deploy", "ppo", *LOCAL, "--nodes", "2", "--follow") == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["rlhf-ppo-0 | rank 0", "rlhf-ppo-1 | rank 1"]


@pytest.mark.parametrize(
    ("command", "part", "container"),
    [("deploy", "ppo", "stage"), ("cluster-logs", "ppo", "stage"), ("cluster-logs", "api", "api")],
)
def test_ctrl_c_ends_the_watching_and_nothing_else(
    command: str, part: str, container: str, rlhf: Run, cluster: Cluster, kubelet: Kubelet
) -> None:
    arguments = [command, part, "--follow"]
    if command == "deploy":
        arguments += LOCAL
    else:
        rlhf("deploy", part, *LOCAL)
    line = [sys.executable, "-m", "rlhf", *arguments, "--namespace", cluster.namespace]
    process = subprocess.Popen(
        line, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    (pod,) = kubelet.wait_for_pods(cluster.namespace)
    kubelet.begin(pod)
    kubelet.logs.write(pod["metadata"]["name"], container, "a line")
    assert process.stdout is not None
    assert process.stdout.readline() == "a line\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1].splitlines()
    assert process.returncode == 75
    again = f"`make cluster-logs STAGE={part} ARGS='--namespace {cluster.namespace}'`"
    assert said[-1] == f"rlhf: stopped watching; rlhf-{part} goes on in the cluster; {again} watches it again"
    assert kubelet.wait_for_pods(cluster.namespace)[0]["metadata"]["uid"] == pod["metadata"]["uid"]
