"""How a Job ended: its exit code, and the one line that matters."""

import json

import pytest

from rlhf.cluster.documents import Document
from rlhf.cluster.snapshot import Snapshot
from rlhf.cluster.verdict import Verdict, job_verdict, last_words, rollout_verdict
from tests.cluster_objects import RUNNING, condition, ended, job, pod, seen

COMPLETE = condition("Complete")
POLICY = condition("Failed", "PodFailurePolicy", "Container check for pod rlhf/x failed with exit code 66")
LIMIT = condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
LINE = "rlhf: the policy of sft is missing; run `make deploy-sft` first"


def failed_pod(code: int, message: str = "", *, container: str = "stage", **more: str) -> Document:
    at = more.get("at", "2026-01-02T12:00:00Z")
    states = {container: ended(code, message, more.get("reason", "Error"), at)}
    return pod(phase="Failed", states=states, suffix=f"{container}{code}{at}")


def test_a_job_at_work_has_no_verdict() -> None:
    assert job_verdict(seen(job(), pod(phase="Running", states={"stage": RUNNING})), "ppo") is None


def test_complete_is_0() -> None:
    assert job_verdict(seen(job(COMPLETE)), "ppo") == Verdict(0, "ppo is done")


@pytest.mark.parametrize("kind", ["Failed", "FailureTarget"])
def test_the_container_that_refused_speaks(kind: str) -> None:
    snapshot = seen(job({**POLICY, "type": kind}), failed_pod(66, LINE, container="check"))
    expected = f"ppo failed (rlhf-ppo-0, container check): exit code 66: {LINE}"
    assert job_verdict(snapshot, "ppo") == Verdict(66, expected)


def test_a_condition_that_is_not_true_says_nothing() -> None:
    assert job_verdict(seen(job({**POLICY, "status": "False"})), "ppo") is None


def test_a_refusal_explains_ranks_that_were_stopped_or_lost_their_peer() -> None:
    pods = (
        failed_pod(65, "rlhf: too many bad rows", at="2026-01-02T12:00:00Z"),
        failed_pod(1, "RuntimeError: connection closed by peer", at="2026-01-02T12:00:09Z"),
        failed_pod(75, "rlhf: stopped", at="2026-01-02T12:00:20Z"),
    )
    assert job_verdict(seen(job(POLICY), *pods), "ppo").exit_code == 65


def test_an_error_explains_more_than_a_stop_and_the_latest_of_several_counts() -> None:
    pods = (
        failed_pod(1, "first", at="2026-01-02T12:00:00Z"),
        failed_pod(1, "second", at="2026-01-02T13:00:00Z"),
        failed_pod(143, "", at="2026-01-02T14:00:00Z"),
    )
    verdict = job_verdict(seen(job(LIMIT), *pods), "ppo")
    assert verdict == Verdict(1, "ppo failed after 3 tries (rlhf-ppo-0, container stage): exit code 1: second")


def test_lack_of_memory_is_named_with_what_to_do() -> None:
    verdict = job_verdict(seen(job(LIMIT), failed_pod(137, reason="OOMKilled")), "ppo")
    assert verdict.exit_code == 137
    assert "OOMKilled): raise the limit in the overlay, or lower the stage's micro_batch_size" in verdict.line


def test_the_deadline_is_named_even_when_its_pods_are_gone() -> None:
    late = condition("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    verdict = job_verdict(seen(job(late)), "ppo")
    assert verdict.exit_code == 75
    assert "activeDeadlineSeconds of 3600 (DeadlineExceeded)" in verdict.line
    assert job_verdict(seen(job(late), failed_pod(78)), "ppo").exit_code == 78


def test_a_pod_that_failed_as_a_whole_says_why() -> None:
    lost = pod(phase="Failed")
    lost["status"] |= {"reason": "UnexpectedAdmissionError", "message": "Allocate failed due to no healthy devices"}
    verdict = job_verdict(seen(job(LIMIT), lost), "ppo")
    assert verdict == Verdict(1, "ppo failed (rlhf-ppo-0): Allocate failed due to no healthy devices")


def test_pods_that_are_gone_leave_the_jobs_own_words() -> None:
    verdict = job_verdict(seen(job(LIMIT)), "ppo")
    assert verdict.exit_code == 1
    assert "Job has reached the specified backoff limit; its pods are gone" in verdict.line


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("", ""),
        ("one line\n", "one line"),
        ("a log\nand its end\n\n", "and its end"),
        (json.dumps({"level": "ERROR", "message": "said"}), "said"),
        (json.dumps({"message": "said", "traceback": "Traceback:\n  x\nValueError: why"}), "ValueError: why"),
        ('{"cut off', '{"cut off'),
    ],
)
def test_the_last_words_of_a_log(message: str, words: str) -> None:
    assert last_words(message) == words


def deployment(**status: object) -> Document:
    return {
        "metadata": {"name": "rlhf-api", "uid": "deployment", "generation": 2},
        "spec": {"replicas": 2},
        "status": {"observedGeneration": 2, **status},
    }


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        ({"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}, True),
        ({"replicas": 2, "updatedReplicas": 2, "availableReplicas": 1}, False),
        ({"replicas": 3, "updatedReplicas": 2, "availableReplicas": 3}, False),
        ({"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2, "observedGeneration": 1}, False),
        ({}, False),
    ],
)
def test_a_rollout_is_over_when_all_pods_are_new_and_available(status: Document, ready: bool) -> None:
    verdict = rollout_verdict(Snapshot(deployment(**status)), "api")
    assert (verdict is not None) == ready
    if verdict is not None:
        assert verdict == Verdict(0, "api is ready: 2 of 2 pods")


def test_a_rollout_that_takes_too_long_ends_with_what_its_pod_says() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
    assert rollout_verdict(Snapshot(deployment(conditions=[late])), "api").exit_code == 69
    crashed = pod(phase="Running", states={"stage": {"waiting": {}, "lastState": ended(66, LINE)}})
    verdict = rollout_verdict(Snapshot(deployment(conditions=[late]), (crashed,)), "api")
    assert verdict.exit_code == 66
    assert verdict.line.endswith(LINE)
