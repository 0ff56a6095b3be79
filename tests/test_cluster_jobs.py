"""What state a Job is in, what is done about it, and how that is shown; the order and the refusals of applying."""

from __future__ import annotations

import pytest

from rlhf.__main__ import build_parser, main
from rlhf.cluster.api import ApiRefusal
from rlhf.cluster.apply import in_order, refused
from rlhf.cluster.deploy import DONE, JOIN, Manner, next_action
from rlhf.cluster.documents import CONFIG_ANNOTATION, RUN_ANNOTATION, Document, identity
from rlhf.cluster.jobs import job_state, refuse_active
from rlhf.cluster.lines import Progress
from rlhf.cluster.overview import COLUMNS, Row, retries, stage_state, table
from rlhf.errors import ConfigError, ConflictError, RlhfError
from tests.cluster_objects import RUNNING, UNSCHEDULABLE, condition, ended, job, pod, seen

COMPLETE, FAILED = condition("Complete"), condition("Failed", "PodFailurePolicy")
MAPS = [
    {"kind": "ConfigMap", "metadata": {"name": "rlhf-config"}, "data": {"config.yaml": "extends: demo"}},
    {"kind": "ConfigMap", "metadata": {"name": "rlhf-environment"}, "data": {"RLHF_RUN": "first"}},
]


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
    for found in (None, job(COMPLETE), job(FAILED), leaving(job())):
        refuse_active(found, "ppo")
    with pytest.raises(ConflictError, match="make cluster-logs STAGE=ppo") as error:
        refuse_active(job(), "ppo")
    assert error.value.exit_code == 73


@pytest.mark.parametrize(
    ("found", "action"),
    [
        (None, "starting for run first"),
        (noted(job(COMPLETE)), DONE),
        (noted(job(COMPLETE), run="other"), "starting for run first"),
        (noted(job(COMPLETE), config="other"), "starting for run first"),
        (job(COMPLETE), "starting for run first"),
        (noted(job()), JOIN),
        (noted(job(suspend=True)), JOIN),
        (noted(job(FAILED)), "failed before; trying again"),
        (noted(leaving(job())), "starting for run first"),
    ],
)
def test_the_pipeline_picks_up_where_the_cluster_is(found: Document | None, action: str) -> None:
    assert next_action(found, MAPS, "ppo", Manner()) == action


def test_the_pipeline_joins_no_job_of_another_run_and_replaces_it_only_when_told() -> None:
    for found, what in ((noted(job(), run="x"), "run 'x'"), (noted(job(), config="x"), "other"), (job(), "other")):
        with pytest.raises(ConflictError, match=what):
            next_action(found, MAPS, "ppo", Manner())
        assert next_action(found, MAPS, "ppo", Manner(replace=True)) == "replacing the Job at work"


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
    assert retries(seen(job(), pod())) == 0
    assert retries(seen(job(), pod(suffix="a"), pod(suffix="b"))) == 1
    assert retries(seen(job(failed=3), pod())) == 3


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


def test_every_stage_and_service_can_be_deployed() -> None:
    for part in ("fetch", "sft", "reward", "prepare", "ppo", "evaluate", "api", "tensorboard", "all"):
        assert build_parser().parse_args(["deploy", part, "--overlay", "x"]).part == part
