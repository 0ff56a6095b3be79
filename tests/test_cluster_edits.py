"""What `deploy` changes in an overlay's documents, and what it refuses to."""

from __future__ import annotations

import copy

import pytest
import yaml

from rlhf.cluster.customise import Changes, customised
from rlhf.cluster.documents import Document, identity, job_identity, workload
from rlhf.cluster.edits import (
    TRAINING_STAGES,
    check_images,
    home_namespace,
    repository,
    with_gpus,
    with_namespace,
    with_nodes,
)
from rlhf.config import Config
from rlhf.errors import ConfigError, UsageError
from rlhf.pipeline import STAGE_NAMES
from rlhf.presets import load_config

PARTS = ("fetch", "ppo", "prepare")


def container(name: str, **variables: str) -> Document:
    gpus = int(variables.get("RLHF_GPUS", "0"))
    amounts = {"cpu": "1", **({"nvidia.com/gpu": gpus} if gpus else {})}
    return {
        "name": name,
        "image": "rlhf-summarizer:0.1.0-cuda",
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
    }


def job(stage: str, **variables: str) -> Document:
    pod = {"initContainers": [container("check", **variables)], "containers": [container("stage", **variables)]}
    labels = {"app.kubernetes.io/component": stage}
    return {
        "kind": "Job",
        "metadata": {"name": f"rlhf-{stage}", "namespace": "rlhf", "labels": labels},
        "spec": {"completions": 1, "parallelism": 1, "template": {"spec": pod}},
    }


def shared(kind: str, name: str, **more: object) -> Document:
    labels = {"app.kubernetes.io/component": "shared"}
    return {"kind": kind, "metadata": {"name": name, "namespace": "rlhf", "labels": labels}, **more}


def overlay() -> list[Document]:
    api = {
        "kind": "Deployment",
        "metadata": {"name": "rlhf-api", "namespace": "rlhf", "labels": {"app.kubernetes.io/component": "api"}},
        "spec": {"template": {"spec": {"containers": [container("api"), {"name": "side", "image": "proxy:1"}]}}},
    }
    api["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "RLHF_RUN", "valueFrom": {}}]
    return [
        {"kind": "Namespace", "metadata": {"name": "rlhf", "labels": {"app.kubernetes.io/component": "shared"}}},
        {"kind": "StorageClass", "metadata": {"name": "fast"}},
        shared("ConfigMap", "rlhf-config", data={"config.yaml": "extends: demo\nppo: {iterations: 5}\n"}),
        shared("ConfigMap", "rlhf-environment", data={"RLHF_RUN": "demo", "NCCL_DEBUG": "WARN"}),
        shared("RoleBinding", "people", subjects=[{"name": "x", "namespace": "rlhf"}, {"name": "y", "namespace": "z"}]),
        job("fetch", RLHF_GPUS="0"),
        job("ppo", RLHF_NODES="1", RLHF_GPUS="8"),
        job("prepare", RLHF_NODES="1", RLHF_GPUS="1"),
        api,
    ]


def stage(documents: list[Document], name: str) -> Document:
    found = workload(documents, name)
    assert found is not None
    return found


def gpus(document: Document) -> list[tuple[str, int | None, int | None]]:
    pod = document["spec"]["template"]["spec"]
    return [
        (
            next(entry["value"] for entry in each["env"] if entry["name"] == "RLHF_GPUS"),
            each["resources"]["requests"].get("nvidia.com/gpu"),
            each["resources"]["limits"].get("nvidia.com/gpu"),
        )
        for each in (*pod["initContainers"], *pod["containers"])
    ]


def test_without_changes_only_the_identity_is_added_and_other_parts_are_left_out() -> None:
    before = overlay()
    made = customised(before, ["ppo"], Changes())
    assert before == overlay()
    assert [document["metadata"]["name"] for document in made] == [
        "rlhf", "fast", "rlhf-config", "rlhf-environment", "people", "rlhf-ppo",
    ]  # fmt: skip
    assert job_identity(made[-1]) == identity(before)
    assert made[:-1] == before[:5]


def test_the_identity_follows_run_and_configuration_and_nothing_else() -> None:
    def named(changes: Changes) -> object:
        return job_identity(stage(customised(overlay(), ["ppo"], changes), "ppo"))

    assert named(Changes(nodes=2, gpus=4, image="r/rlhf-summarizer:2")) == named(Changes())
    assert named(Changes(run="other")) != named(Changes())
    assert named(Changes(overrides=("seed=4",))) != named(Changes())
    assert named(Changes(overrides=("seed=4",))) == named(Changes(overrides=("seed=4",)))


def test_a_service_gets_new_pods_for_another_run() -> None:
    templates = [
        stage(customised(overlay(), ["api"], Changes(run=run)), "api")["spec"]["template"]["metadata"]
        for run in ("first", "second")
    ]
    assert [each["annotations"] for each in templates] == [{"rlhf.summarizer/run": run} for run in ("first", "second")]


def test_our_image_is_changed_and_others_are_not() -> None:
    made = customised(overlay(), ["api", "ppo"], Changes(image="r.example.com:5000/team/rlhf-summarizer@sha256:ab"))
    images = [each["image"] for each in stage(made, "api")["spec"]["template"]["spec"]["containers"]]
    assert images == ["r.example.com:5000/team/rlhf-summarizer@sha256:ab", "proxy:1"]
    pod = stage(made, "ppo")["spec"]["template"]["spec"]
    assert {each["image"] for each in (*pod["initContainers"], *pod["containers"])} == set(images[:1])


@pytest.mark.parametrize("image", ["rlhf-summarizer", "r:5000/rlhf-summarizer", "r/rlhf-summarizer:latest"])
def test_an_image_that_can_change_is_refused(image: str) -> None:
    with pytest.raises(UsageError, match="names no fixed version; use a tag of your own or a digest"):
        customised(overlay(), ["ppo"], Changes(image=image))


@pytest.mark.parametrize("image", ["x:1", "r:5000/x:1.2", "r:5000/x@sha256:ab", "x:latest@sha256:ab"])
def test_a_fixed_image_is_taken(image: str) -> None:
    document = job("ppo")
    document["spec"]["template"]["spec"] = {"containers": [{"name": "stage", "image": image}]}
    check_images([document])
    assert repository(image) in ("x", "r:5000/x")


def test_nodes_are_those_of_stages_that_can_be_shared() -> None:
    made = with_nodes(overlay(), 4)
    for name in ("ppo", "prepare"):
        spec = stage(made, name)["spec"]
        assert (spec["completions"], spec["parallelism"]) == (4, 4)
        pod = spec["template"]["spec"]
        for each in (*pod["initContainers"], *pod["containers"]):
            assert {"name": "RLHF_NODES", "value": "4"} in each["env"]
    assert stage(made, "fetch") == stage(overlay(), "fetch")


def test_in_a_pipeline_nodes_are_those_of_training_stages() -> None:
    made = customised(overlay(), PARTS, Changes(nodes=4))
    assert [stage(made, name)["spec"]["completions"] for name in PARTS] == [1, 4, 1]
    alone = customised(overlay(), ["prepare"], Changes(nodes=4))
    assert stage(alone, "prepare")["spec"]["completions"] == 4


def test_training_stages_are_those_with_a_strategy() -> None:
    sections = {name: getattr(Config(), name, None) for name in STAGE_NAMES}
    assert {name for name, section in sections.items() if hasattr(section, "deepspeed")} == set(TRAINING_STAGES)


def test_gpus_are_requested_limited_and_told_in_both_containers() -> None:
    made = with_gpus(overlay(), 4)
    assert gpus(stage(made, "ppo")) == gpus(stage(made, "prepare")) == [("4", 4, 4)] * 2
    none = with_gpus(overlay(), 0)
    assert gpus(stage(none, "ppo")) == [("0", None, None)] * 2


def test_in_a_pipeline_stages_that_do_not_train_keep_their_few() -> None:
    made = customised(overlay(), PARTS, Changes(gpus=4))
    assert [gpus(stage(made, name))[0][0] for name in PARTS] == ["0", "4", "1"]
    made = customised(overlay(), PARTS, Changes(gpus=0))
    assert [gpus(stage(made, name))[0] for name in PARTS] == [("0", None, None)] * 3


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("ppo", Changes(nodes=0), "--nodes 0 is less than 1"),
        ("ppo", Changes(gpus=-1), "--gpus -1 is less than 0"),
        ("fetch", Changes(nodes=2), "--nodes is for stages that nodes can share"),
        ("api", Changes(gpus=2), "--gpus is for stages"),
        ("ppo", Changes(run="../other"), "is not a run name"),
        ("sft", Changes(), "the overlay has no Job or Deployment for sft"),
    ],
)
def test_a_change_that_means_nothing_is_refused(part: str, changes: Changes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        customised(overlay(), [part], changes)


def test_an_overlay_of_another_kind_says_how_it_is_applied() -> None:
    with pytest.raises(UsageError, match=r"it has JobSet/rlhf: apply it with `kubectl apply -k`"):
        customised([shared("JobSet", "rlhf")], ["ppo"], Changes())


def test_everything_of_ours_moves_to_another_namespace() -> None:
    foreign = shared("ConfigMap", "theirs")
    foreign["metadata"]["namespace"] = "monitoring"
    made = with_namespace([*overlay(), foreign], "team")
    assert made[0]["metadata"]["name"] == "team"
    assert "namespace" not in made[1]["metadata"]
    assert {document["metadata"]["namespace"] for document in made[2:-1]} == {"team"}
    assert [subject["namespace"] for subject in made[4]["subjects"]] == ["team", "z"]
    assert made[-1] == foreign
    assert home_namespace(made) == "team"


def test_documents_without_one_namespace_are_refused() -> None:
    lost = copy.deepcopy(overlay())
    lost[6]["metadata"]["namespace"] = "elsewhere"
    with pytest.raises(ConfigError, match=r"must name one namespace; they name \['elsewhere', 'rlhf'\]"):
        home_namespace(lost)


def test_the_configuration_is_resolved_from_preset_file_or_overlay(tmp_path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: demo\nseed: 9\n", encoding="utf-8")
    for changes, expected in {
        Changes(config="demo", overrides=("ppo.iterations=3",)): load_config("demo", ["ppo.iterations=3"]),
        Changes(config=str(mine)): load_config("demo", ["seed=9"]),
        Changes(overrides=("seed=2",)): load_config("demo", ["seed=2", "ppo.iterations=5"]),
    }.items():
        made = customised(overlay(), ["ppo"], changes)
        text = made[2]["data"]["config.yaml"]
        assert text == expected.to_yaml()
        assert yaml.safe_load(text)["ppo"]["iterations"] == expected.ppo.iterations


def test_a_wrong_setting_is_one_line_before_anything_is_applied() -> None:
    with pytest.raises(ConfigError, match=r"unknown key ppo.iteration; did you mean ppo.iterations\?"):
        customised(overlay(), ["ppo"], Changes(overrides=("ppo.iteration=3",)))
    with pytest.raises(ConfigError, match="no ConfigMap rlhf-environment to write RLHF_RUN into"):
        customised([job("ppo")], ["ppo"], Changes(run="x"))


def test_a_service_is_told_its_run_by_name() -> None:
    service = container("api", APP_RUN_DIR="/runs/$(RLHF_RUN)", APP_PORT="8000")
    service["env"].insert(0, {"name": "RLHF_RUN", "valueFrom": {"configMapKeyRef": {"name": "rlhf-environment"}}})
    deployment = {
        "kind": "Deployment",
        "metadata": {"name": "rlhf-api", "namespace": "rlhf", "labels": {"app.kubernetes.io/component": "api"}},
        "spec": {"template": {"spec": {"containers": [service]}}},
    }
    made = customised([*overlay(), deployment], ["api"], Changes(run="second"))[-1]
    told = {entry["name"]: entry.get("value") for entry in made["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert told == {"RLHF_RUN": None, "APP_RUN_DIR": "/runs/second", "APP_PORT": "8000"}
    assert made["spec"]["template"]["metadata"]["annotations"] == {"rlhf.summarizer/run": "second"}
