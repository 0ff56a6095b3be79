"""What stands in a Job's way, told once and in the words of those who know."""

from rlhf.cluster.documents import Document
from rlhf.cluster.obstacles import Fact, deployment_facts, job_facts
from tests.cluster_objects import (
    RUNNING,
    UNSCHEDULABLE,
    claim,
    condition,
    ended,
    event,
    job,
    pod,
    seen,
    waiting,
)


def only(facts: list[Fact]) -> Fact:
    assert len(facts) == 1, [str(fact) for fact in facts]
    return facts[0]


def test_the_scheduler_speaks_and_the_request_is_named() -> None:
    fact = only(job_facts(seen(job(), pod(conditions=(UNSCHEDULABLE,)))))
    assert str(fact) == (
        "rlhf-ppo-0: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu. "
        "(a pod asks for nvidia.com/gpu: 8, cpu: 32, memory: 512Gi)"
    )
    assert fact.blocks


def test_pods_with_the_same_trouble_are_told_together() -> None:
    pods = [pod(index=index, conditions=(UNSCHEDULABLE,)) for index in range(8)]
    assert only(job_facts(seen(job(), *pods))).who == "rlhf-ppo-0 and 7 more"


def test_a_pod_that_no_scheduler_saw_is_told() -> None:
    assert only(job_facts(seen(job(), pod()))).text == "no scheduler has looked at it yet"


def test_an_image_stays_one_trouble_while_its_reason_alternates() -> None:
    def told(reason: str, message: str, *events: Document) -> Fact:
        return only(job_facts(seen(job(), pod(node="a", states={"check": waiting(reason, message)}), events=events)))

    expected = "image r/rlhf-summarizer:1 cannot be had (ImagePullBackOff): not found; is it pushed, and may the node"
    pull = told("ErrImagePull", "not found")
    assert pull.text.startswith(expected)
    assert pull.blocks
    assert told("ImagePullBackOff", 'Back-off pulling image "x": ErrImagePull: not found') == pull
    older = event(pod(), "Failed", 'Failed to pull image "x": not found')
    assert (
        "(ImagePullBackOff): Failed to pull image" in told("ImagePullBackOff", 'Back-off pulling image "x"', older).text
    )
    assert "cannot be had (InvalidImageName): bad" in told("InvalidImageName", "bad").text


def test_a_container_whose_secret_is_missing_is_told() -> None:
    state = waiting("CreateContainerConfigError", 'secret "rlhf-hub-token" not found')
    fact = only(job_facts(seen(job(), pod(node="a", states={"check": state}))))
    assert str(fact) == 'rlhf-ppo-0: CreateContainerConfigError: secret "rlhf-hub-token" not found'
    assert fact.blocks


def test_a_starting_pod_is_news_and_no_obstacle_until_its_newest_event_is_a_warning() -> None:
    starting = pod(node="gpu-1", states={"check": waiting("PodInitializing")})
    mount = event(starting, "FailedMount", "Unable to attach\n  or mount volumes", at="2026-01-02T12:00:01Z")
    pulling = event(starting, "Pulling", 'Pulling image "r/x:1"', kind="Normal", at="2026-01-02T12:00:02Z")
    stuck = only(job_facts(seen(job(), starting, events=(mount,))))
    assert (stuck.text, stuck.blocks) == ("FailedMount: Unable to attach or mount volumes", True)
    fine = only(job_facts(seen(job(), starting, events=(pulling, mount))))
    assert (fine.text, fine.blocks) == ('is being started on gpu-1: Pulling image "r/x:1"', False)


def test_quota_and_admission_denials_are_the_same_news_for_every_pod_name() -> None:
    def denial(name: str) -> Fact:
        message = f'Error creating: pods "{name}" is forbidden: exceeded quota: gpus, requested: x=8, used: x=0'
        return only(job_facts(seen(job(), events=(event(job(), "FailedCreate", message),))))

    assert denial("rlhf-ppo-0-aaaaa") == denial("rlhf-ppo-0-bbbbb")
    assert (
        denial("x").text == "pods cannot be created: pods is forbidden: exceeded quota: gpus, requested: x=8, used: x=0"
    )


def test_a_denial_before_the_newest_pod_is_old_news() -> None:
    old = event(job(), "FailedCreate", "Error creating: quota", at="2026-01-02T11:00:00Z")
    running = pod(phase="Running", node="a", states={"stage": RUNNING})
    assert only(job_facts(seen(job(), running, events=(old,)))).text == "runs on a"


def test_events_of_an_earlier_job_of_the_same_name_say_nothing() -> None:
    earlier = {"metadata": {"uid": "earlier"}}
    assert job_facts(seen(job(), events=(event(earlier, "FailedCreate", "quota"),))) == []


def test_a_claim_is_told_with_its_events_and_what_it_asks_for() -> None:
    words = event(claim(), "FailedBinding", "no persistent volumes available for this claim", kind="Normal")
    facts = job_facts(seen(job(), pod(conditions=(UNSCHEDULABLE,)), events=(words,), claims=(claim(),)))
    assert str(facts[1]).startswith(
        "PersistentVolumeClaim rlhf-runs: is Pending: no persistent volumes available for this claim "
        "(asks for ReadWriteMany, the default storage class)"
    )
    named = claim(storage_class="fast")
    assert "storage class fast" in str(job_facts(seen(job(), pod(), claims=(named,)))[1])


def test_a_claim_that_waits_for_its_pod_or_is_bound_is_none() -> None:
    words = event(claim(), "WaitForFirstConsumer", "waiting for first consumer", kind="Normal")
    assert len(job_facts(seen(job(), pod(), events=(words,), claims=(claim(),)))) == 1
    assert len(job_facts(seen(job(), pod(), claims=(claim("Bound"),)))) == 1


def test_a_suspended_job_waits_in_a_queue_and_is_not_stuck() -> None:
    queued = job(condition("Suspended", message="Job suspended"), suspend=True)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    fact = only(job_facts(seen(queued)))
    assert (fact.text, fact.blocks) == ("waits in Kueue's queue 'gpus' (Job suspended)", False)
    assert only(job_facts(seen(job(suspend=True)))).text == "is suspended"


def history(*pods: Document) -> list[str]:
    return [str(fact) for fact in job_facts(seen(job(), *pods))]


def test_what_happened_to_pods_that_others_replaced() -> None:
    taken = pod(phase="Failed", conditions=(condition("DisruptionTarget", "PreemptionByScheduler", "for a better"),))
    stopped = pod(suffix="b", phase="Failed", states={"stage": ended(75, "stopped")})
    broken = pod(suffix="c", phase="Failed", states={"stage": ended(1, "RuntimeError: NCCL")})
    assert history(taken) == [
        "rlhf-ppo-0: is taken away (PreemptionByScheduler: for a better); another pod goes on from the last save"
    ]
    assert history(stopped) == ["rlhf-ppo-0: stopped with its state saved; another pod goes on"]
    assert history(broken) == ["rlhf-ppo-0: exit code 1: RuntimeError: NCCL; another pod tries again (backoffLimit 6)"]
    assert history(pod(phase="Failed", states={"check": ended(66, "no model")})) == []


def test_pods_of_a_service_that_crash_or_cannot_be_made() -> None:
    failure = condition("ReplicaFailure", "FailedCreate", 'pods "rlhf-api-x" is forbidden: exceeded quota: few')
    owner = {"metadata": {"name": "rlhf-api", "uid": "d"}, "spec": {}, "status": {"conditions": [failure]}}
    fact = only(deployment_facts(seen(owner)))
    assert str(fact) == "rlhf-api: pods cannot be created: pods is forbidden: exceeded quota: few"
    state = {**waiting("CrashLoopBackOff"), "lastState": ended(66, "rlhf: no model"), "restartCount": 3}
    owner["status"]["conditions"] = []
    crash = only(deployment_facts(seen(owner, pod(phase="Running", node="a", states={"stage": state}))))
    assert (crash.exit_code, crash.blocks) == (66, True)
    assert crash.text == "starts again and again (3 times); exit code 66: rlhf: no model"
