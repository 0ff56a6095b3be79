"""What state a Job is in, what is done about it, and how that is shown; the order and the refusals of applying."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf.__main__ import build_parser, main
from rlhf.cluster.api import CLAIM, POD, ApiRefusal, Cluster, Kind
from rlhf.cluster.apply import in_order, refused
from rlhf.cluster.deploy import DONE, JOIN, Manner, next_action
from rlhf.cluster.documents import CONFIG_ANNOTATION, RUN_ANNOTATION, Document, identity
from rlhf.cluster.jobs import job_state, refuse_active, refuse_owned, watch_command
from rlhf.cluster.lines import Progress
from rlhf.cluster.overview import COLUMNS, Row, retries, stage_state, table
from rlhf.cluster.snapshot import job_snapshot
from rlhf.errors import ConfigError, ConflictError, RlhfError
from tests.cluster_objects import RUNNING, UNSCHEDULABLE, claim, condition, ended, event, job, pod, seen
from tests.conftest import REPOSITORY

COMPLETE, FAILED = condition("Complete"), condition("Failed", "PodFailurePolicy")
MAPS = [
    {"kind": "ConfigMap", "metadata": {"name": "rlhf-config"}, "data": {"config.yaml": "extends: demo"}},
    {"kind": "ConfigMap", "metadata": {"name": "rlhf-environment"}, "data": {"RLHF_RUN": "first"}},
]


def cluster(namespace: str = "rlhf", context: str | None = None) -> Cluster:
    return Cluster(None, namespace, print, context)


def leaving(document: Document) -> Document:
    document["metadata"]["deletionTimestamp"] = "2026-01-02T12:00:00Z"
    return document


def noted(document: Document, run: str = "first", config: str | None = None) -> Document:
    digest = identity(MAPS).config if config is None else config
    document["metadata"]["annotations"] = {RUN_ANNOTATION: run, CONFIG_ANNOTATION: digest}
    return document


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (None, "absent"),
        (job(), "active"),
        (job(suspend=True), "active"),
        (job({**COMPLETE, "status": "False"}), "active"),
        (job({**FAILED, "type": "FailureTarget"}), "active"),
        (job(COMPLETE), "complete"),
        (job(FAILED), "failed"),
        (leaving(job(COMPLETE)), "leaving"),
    ],
)
def test_the_state_of_a_job(found: Document | None, state: str) -> None:
    assert job_state(found) == state


def test_only_an_active_job_is_refused() -> None:
    for found in (job(COMPLETE), job(FAILED), leaving(job())):
        refuse_active(cluster(), found)
    with pytest.raises(ConflictError, match=r"`make cluster-logs STAGE=ppo`, or replace it with --replace") as error:
        refuse_active(cluster(), job())
    assert error.value.exit_code == 73


def test_a_job_of_a_jobset_is_left_to_it() -> None:
    refuse_owned(job())
    owned = job()
    owned["metadata"]["ownerReferences"] = [{"kind": "JobSet", "name": "rlhf"}]
    with pytest.raises(ConflictError, match=r"belongs to JobSet rlhf; .* `kubectl delete jobset rlhf` first"):
        refuse_owned(owned)


def test_what_to_type_names_the_place_where_it_is_not_the_usual() -> None:
    assert watch_command(cluster(), "ppo") == "make cluster-logs STAGE=ppo"
    elsewhere = cluster(namespace="team", context="prod")
    assert watch_command(elsewhere, "ppo") == "make cluster-logs STAGE=ppo ARGS='--namespace team --context prod'"


@pytest.mark.parametrize(
    ("found", "action"),
    [
        (None, "starts for run first"),
        (noted(job(COMPLETE)), DONE),
        (noted(job(COMPLETE), run="other"), "starts for run first"),
        (noted(job(COMPLETE), config="other"), "starts for run first"),
        (job(COMPLETE), "starts for run first"),
        (noted(job()), JOIN),
        (noted(job(suspend=True)), JOIN),
        (noted(job(FAILED)), "failed before; trying again"),
        (noted(leaving(job())), "starts for run first"),
    ],
)
def test_the_pipeline_picks_up_where_the_cluster_is(found: Document | None, action: str) -> None:
    assert next_action(cluster(), found, MAPS, Manner()) == action


def test_the_pipeline_joins_no_job_of_another_run_and_replaces_it_only_when_told() -> None:
    for found, what in ((noted(job(), run="x"), "run 'x'"), (noted(job(), config="x"), "other"), (job(), "other")):
        with pytest.raises(ConflictError, match=what):
            next_action(cluster(), found, MAPS, Manner())
        assert next_action(cluster(), found, MAPS, Manner(replace=True)) == "is at work; replacing its Job"


def test_what_others_need_is_applied_first() -> None:
    kinds = ["Job", "Service", "ConfigMap", "Deployment", "Namespace", "PersistentVolumeClaim", "ServiceAccount"]
    documents = [{"kind": kind, "metadata": {"name": "x"}} for kind in kinds]
    assert [document["kind"] for document in in_order(documents)] == [
        "Namespace", "ServiceAccount", "ConfigMap", "PersistentVolumeClaim", "Service", "Deployment", "Job",
    ]  # fmt: skip


def refusal(status: int, message: str, *causes: Document) -> ApiRefusal:
    return ApiRefusal(message, status, {"details": {"causes": list(causes)}})


@pytest.mark.parametrize(
    ("found", "kind", "line"),
    [
        (
            refusal(409, "conflict", {"message": 'conflict with "keda" using v1', "field": ".spec.replicas"}),
            ConflictError,
            r"\.spec\.replicas was set by keda; leave it out of the overlay, or take it over with --force-conflicts",
        ),
        (refusal(422, "spec.template: field is immutable"), ConflictError, "created by somebody else a moment ago"),
        (refusal(422, "spec.parallelism: must be positive"), ConfigError, "Job/rlhf-ppo: spec.parallelism: must be"),
        (refusal(403, "you may not"), ApiRefusal, "you may not"),
    ],
)
def test_what_a_refusal_means(found: ApiRefusal, kind: type[RlhfError], line: str) -> None:
    with pytest.raises(kind, match=line):
        raise refused({"kind": "Job", "metadata": {"name": "rlhf-ppo"}}, found)


class Answers:
    """A cluster with one Job, its pods, a claim and an event; what may not be read is refused."""

    def __init__(self, found: Document, *pods: Document, readable: bool = True) -> None:
        self.job, self.pods, self.readable = found, pods, readable

    def get(self, kind: Kind, name: str) -> Document:
        return self.job

    def list(self, kind: Kind, *, labels: str = "") -> list[Document]:
        if kind == POD:
            return list(self.pods)
        if not self.readable:
            raise ApiRefusal("you may not", 403, {})
        return [claim() if kind == CLAIM else event(job(), "FailedCreate", "quota")]


@pytest.mark.parametrize(
    ("phases", "asked"),
    [((), True), (("Failed",), True), (("Pending",), True), (("Running",), False), (("Succeeded",), False)],
)
def test_reasons_are_looked_for_while_a_pod_is_missing_or_waits(phases: tuple[str, ...], asked: bool) -> None:
    pods = [pod(phase=phase) for phase in phases]
    snapshot = job_snapshot(Answers(job(), *pods), "ppo")
    assert (len(snapshot.events), len(snapshot.claims)) == ((1, 1) if asked else (0, 0))
    assert job_snapshot(Answers(job(), *pods, readable=False), "ppo").events == ()


def test_the_state_of_a_stage_in_a_word_and_why() -> None:
    running = pod(phase="Running", node="a", states={"stage": RUNNING})
    alone = pod(index=1, conditions=(UNSCHEDULABLE,))
    good = pod(phase="Succeeded", states={"stage": ended(0, "rlhf: 400 posts, gold 91.6", "Completed")})
    assert stage_state(seen(job(), running), "ppo") == ("running", "")
    assert stage_state(seen(job(), running, alone), "ppo")[0] == "waiting"
    assert stage_state(seen(job()), "ppo") == ("waiting", "")
    assert stage_state(seen(job(suspend=True)), "ppo") == ("suspended", "rlhf-ppo: is suspended")
    assert stage_state(seen(job(COMPLETE), good), "ppo") == ("done", "rlhf: 400 posts, gold 91.6")
    assert stage_state(seen(leaving(job()), running), "ppo") == ("leaving", "")
    assert stage_state(seen(job(FAILED)), "ppo")[0] == "failed"


def test_retries_are_what_shows_more_of_them() -> None:
    assert retries(job(), [pod()], []) == 0
    assert retries(job(), [pod(suffix="a"), pod(suffix="b")], []) == 1
    assert retries(job(failed=3), [pod()], []) == 3
    created = event(job(), "SuccessfulCreate", "Created pod: x", kind="Normal")
    assert retries(job(), [pod()], [created, created, event(pod(), "SuccessfulCreate", "another's")]) == 1


def test_the_table_leaves_empty_columns_out() -> None:
    progress = Progress("ppo", 3, 16, "iterations", 65.0, (("reward", "0.41"),))
    running = Row("ppo", "running", "first", progress, "0", "gpu-1")
    assert table([COLUMNS, Row("sft").cells(), running.cells()]) == [
        "stage  state    run    step                reward  time left  retries  node",
        "sft    absent",
        "ppo    running  first  3 of 16 iterations  0.41    1 min 5 s  0        gpu-1",
    ]
    done = Row("ppo", "done", progress=progress)
    assert table([COLUMNS, done.cells()]) == [
        "stage  state  step                reward",
        f"ppo    done   {done.cells()[3]}  0.41",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deploy",), "required: STAGE, --overlay"),
        (("deploy", "pp", "--overlay", "local-cpu"), "invalid choice: 'pp'"),
        (("deploy", "ppo", "--overlay", "local-cpu", "--nodes", "two"), "invalid int value"),
        (("cluster-logs",), "required: STAGE"),
    ],
)
def test_a_wrong_command_line_is_64(arguments: tuple[str, ...], message: str, capsys) -> None:
    assert main(arguments) == 64
    assert message in capsys.readouterr().err


def test_the_commands_import_nothing_of_kubernetes_before_they_run() -> None:
    code = "import sys, rlhf.__main__ as m; m.build_parser(); sys.exit(bool({'kubernetes', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_every_stage_and_service_can_be_deployed() -> None:
    for part in ("fetch", "sft", "reward", "prepare", "ppo", "evaluate", "api", "tensorboard", "all"):
        assert build_parser().parse_args(["deploy", part, "--overlay", "x"]).part == part
