"""Six stages on one volume, run again, and robbed of their pods in the middle."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.pipeline import STAGE_NAMES
from tests.e2e.place import Ended, Object, Place

pytestmark = pytest.mark.timeout(900)

INSIDE = Path(__file__).with_name("inside.py")
MANIFEST = "cat {run}/ppo/final/manifest.json"


def conditions(job: Object) -> set[str]:
    """The conditions of a Job that hold."""
    return {entry["type"] for entry in job["status"].get("conditions", []) if entry["status"] == "True"}


def copied(place: Place, run: str, *stages: str) -> None:
    """A new run that begins with stages of `demo`."""
    place.on_volume(f"mkdir {run}; cd demo; cp -a {' '.join(stages)} ../{run}/")


def saved(place: Place, job: str, line: str) -> bool:
    """Whether the first rank's log of a stage says that a step was saved."""
    listed = [pod for pod in place.pods(job) if pod["spec"]["hostname"] == f"{job}-0"]
    begun = [pod for pod in listed if pod["status"]["phase"] == "Running"]
    return bool(begun) and line in place.kubectl("logs", begun[0]["metadata"]["name"], "--container", "stage")


def metrics(place: Place, run: str, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.on_volume(f"cat {run}/{stage}/metrics.jsonl").splitlines()]


def test_all_six_jobs_complete_on_the_shared_volume(place: Place, finished: Ended) -> None:
    assert "all stages of run demo are done" in finished.verdict
    for stage in STAGE_NAMES:
        assert "Complete" in conditions(place.get("job", f"rlhf-{stage}")), stage
    published = place.on_volume("ls -d demo/*/final/manifest.json").split()
    assert published == [f"demo/{stage}/final/manifest.json" for stage in sorted(STAGE_NAMES)]
    assert "<html" in place.on_volume("head -c 200 demo/report/index.html")


def test_started_again_it_finds_everything_done(place: Place, finished: Ended) -> None:
    def uids() -> list[str]:
        return [place.get("job", f"rlhf-{stage}")["metadata"]["uid"] for stage in STAGE_NAMES]

    before = uids()
    again = place.deploy("all", "--wait")
    assert again.code == 0, again.err
    assert again.err.count("is done already") == len(STAGE_NAMES)
    assert uids() == before
    assert again.seconds < 30


def test_status_shows_every_stage(place: Place, finished: Ended) -> None:
    shown = place.rlhf("cluster-status")
    assert shown.code == 0, shown.err
    rows = {line.split()[0]: line for line in shown.out.splitlines() if line.split()[0] in STAGE_NAMES}
    assert [rows[stage].split()[1:3] for stage in STAGE_NAMES] == [["done", "demo"]] * len(STAGE_NAMES)
    assert "16 of 16 iterations" in rows["ppo"]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_logs_are_a_fact_a_line(place: Place, finished: Ended, stage: str) -> None:
    lines = place.kubectl("logs", f"job/rlhf-{stage}", "--container", "stage").splitlines()
    assert lines
    for line in lines:
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys(), line
    shown = place.rlhf("cluster-logs", stage)
    assert shown.out.splitlines()[-len(lines) :] == lines


@pytest.mark.parametrize("grace", [(), ("--grace-period=0", "--force")], ids=["told", "killed"])
def test_a_pod_deleted_in_the_middle_of_ppo_changes_nothing(
    place: Place, finished: Ended, grace: tuple[str, ...]
) -> None:
    run = f"robbed-{len(grace)}"
    copied(place, run, "fetch", "sft", "reward", "prepare")
    with place.began("deploy", "ppo", *place.options(), "--run", run, "--wait") as deploying:
        deploying.until(lambda: saved(place, "rlhf-ppo", f"/runs/{run}/ppo/step-00000002"), what="saved step")
        (first,) = place.pods("rlhf-ppo")
        place.kubectl("delete", "pod", first["metadata"]["name"], *grace)
        ended = deploying.ended()
    assert ended.code == 0, ended.err

    job = place.get("job", "rlhf-ppo")
    assert "Complete" in conditions(job)
    if not grace:
        assert job["status"].get("failed", 0) == 0
        assert "stopped with its state saved; another pod goes on" in ended.err
    assert [pod["metadata"]["name"] for pod in place.pods("rlhf-ppo")] != [first["metadata"]["name"]]
    theirs, ours = (json.loads(place.on_volume(MANIFEST.format(run=name))) for name in ("demo", run))
    assert {"model.safetensors", "value.safetensors", "optimizer.safetensors"} <= theirs["files"].keys()
    assert ours == theirs  # sizes and sha256 of all files: weights, optimiser, counters
    assert [row["step"] for row in metrics(place, run, "ppo")] == list(range(17))


def test_two_pods_are_one_process_group_and_outlive_the_loss_of_one(place: Place, finished: Ended) -> None:
    copied(place, "pair", "fetch")
    two = ("--run", "pair", "--nodes", "2", "--set", "sft.max_steps=60", "--set", "sft.micro_batch_size=8")
    with place.began("deploy", "sft", *place.options(), *two, "--wait") as deploying:
        deploying.until(lambda: saved(place, "rlhf-sft", "/runs/pair/sft/step-00000010"), what="saved step")
        pods = place.pods("rlhf-sft")
        check_inside(place, pods)
        place.kubectl("delete", "pod", pods[1]["metadata"]["name"])
        ended = deploying.ended()
    assert ended.code == 0, ended.err

    job = place.get("job", "rlhf-sft")
    assert (job["spec"]["completions"], job["status"]["succeeded"], job["status"].get("failed", 0)) == (2, 2, 0)
    steps = [row["step"] for row in metrics(place, "pair", "sft") if "sft/loss" in row]
    assert steps == [1, 10, 20, 30, 40, 50, 60]


def check_inside(place: Place, pods: list[Object]) -> None:
    """Both pods hold a rank of one group of two, and may do nothing but their work."""
    assert [pod["spec"]["hostname"] for pod in pods] == ["rlhf-sft-0", "rlhf-sft-1"]
    for rank, pod in enumerate(pods):
        facts = json.loads(place.in_pod(pod["metadata"]["name"], INSIDE))
        assert facts.pop("ranks") == [[rank, 2]]
        assert facts.pop("shared memory") >= 2**30
        assert facts == {
            "user": 10001,
            "group": 10001,
            "first process": "/usr/bin/tini",
            "writes": ["/runs", "/tmp"],
            "token": False,
            "capabilities": 0,
            "no new privileges": True,
            "system calls filtered": True,
        }


def test_stopping_to_watch_stops_nothing(place: Place, finished: Ended) -> None:
    copied(place, "watched", "fetch", "sft", "reward", "prepare")
    with place.began("deploy", "ppo", *place.options(), "--run", "watched", "--wait") as deploying:
        deploying.until(lambda: saved(place, "rlhf-ppo", "/runs/watched/ppo/step-00000002"), what="saved step")
        deploying.process.send_signal(signal.SIGINT)  # Ctrl-C
        stopped = deploying.ended(60)
    assert stopped.code == 75
    assert "goes on in the cluster" in stopped.verdict
    joined = place.rlhf("cluster-logs", "ppo", "--follow", "--tail", "1")
    assert (joined.code, joined.verdict) == (0, "ppo is done")
