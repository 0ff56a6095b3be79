"""The settings in the manifests are the program's own, and fit the machines that the Jobs ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.__main__ import build_parser
from rlhf.cluster.customise import Changes, customised
from rlhf.config import Config
from rlhf.gpus import Gpus
from rlhf.launcher.layout import layout
from rlhf.preflight import check
from rlhf.presets import load_config, preset_names
from rlhf.shares import check_ppo_shares, check_training_shares
from tests import manifests
from tests.conftest import REPOSITORY
from tests.manifests import OVERLAYS, Documents, base, containers, environment, find, of_kind, pod_templates

LAUNCH = build_parser().parse_args(["launch", "ppo"])


@pytest.fixture(params=["base", *OVERLAYS])
def documents(request: pytest.FixtureRequest) -> Documents:
    return base() if request.param == "base" else manifests.overlay(request.param)


def settings(documents: Documents, folder: Path) -> Config:
    """The configuration as a pod reads it from the ConfigMap."""
    path = folder / "config.yaml"
    path.write_text(find(documents, "ConfigMap", "rlhf-config")["data"]["config.yaml"], encoding="utf-8")
    return load_config(str(path))


def processes(documents: Documents, stage: str) -> int:
    """Nodes times GPUs of a stage's Job, as its container is told."""
    (template,) = (
        template for name, template in pod_templates(documents)
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == stage
    )  # fmt: skip
    variables = environment(template["spec"]["containers"][0])
    return int(variables["RLHF_NODES"]) * max(int(variables["RLHF_GPUS"]), 1)


def test_batches_divide_among_the_gpus(documents: Documents, tmp_path: Path) -> None:
    config = settings(documents, tmp_path)
    check_training_shares(config.sft, name="sft", processes=processes(documents, "sft"))
    check_training_shares(config.reward, name="reward", processes=processes(documents, "reward"))
    check_ppo_shares(config.ppo, processes(documents, "ppo"))


def test_a_pod_of_two_gpus_is_one_process_with_a_dedicated_scorer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What docs/kubernetes.md says.
    values = ("ppo.reward_placement=dedicated", "ppo.rollouts_per_iteration=128", "ppo.minibatch_size=4")
    made = customised(base(), ["ppo"], Changes(gpus=2, overrides=values))
    for container in containers(find(made, "Job", "rlhf-ppo")["spec"]["template"]):
        for name, value in environment(container).items():
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("RLHF_PROCESSES", raising=False)
    monkeypatch.setattr("rlhf.launcher.layout.visible_gpus", lambda: Gpus(2, 13000, ""))
    config = settings(made, tmp_path)
    assert layout(LAUNCH, parallel=True, device=config.runtime.device, dedicated=True).processes == 1
    seen = check("ppo", config, tmp_path / "runs" / "first", gpus=None)
    assert next(seen) == "settings: they fit run first and 1 process(es)"


def test_the_service_scores_ppo_before_there_is_a_policy(tmp_path: Path) -> None:
    documents = manifests.component("ppo-remote")
    config = settings(documents, tmp_path)
    (service,) = find(documents, "Deployment", "rlhf-api")["spec"]["template"]["spec"]["containers"]
    told = environment(service)
    assert told["APP_MODELS"] == "sft"
    assert told["APP_PRECISION"] == config.runtime.precision
    at_once = config.ppo.rollouts_per_iteration * config.prompt.max_sequence_tokens
    assert int(told["APP_QUEUE_TOKENS"]) >= at_once


def test_the_document_names_the_service_and_the_key_as_they_are() -> None:
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    documents = manifests.component("ppo-remote")
    (port,) = find(documents, "Service", "rlhf-api")["spec"]["ports"]
    assert f"ppo.remote.url=http://rlhf-api:{port['port']}\n" in text
    pod = find(documents, "Job", "rlhf-ppo")["spec"]["template"]["spec"]
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "api-key")
    (volume,) = (each for each in pod["volumes"] if each["name"] == "api-key")
    assert f"ppo.remote.api_key_file={mount['mountPath']}/key`" in text
    assert f"secret generic {volume['secret']['secretName']} --from-file=key=ppo.key\n" in text


def test_more_nodes_are_the_same_training(tmp_path: Path) -> None:
    one, two = settings(manifests.overlay("single-node"), tmp_path), settings(manifests.overlay("multi-node"), tmp_path)
    # Micro-batches are how the work is cut, not what is learnt.
    cut = {"micro_batch_size"}
    for section in ("seed", "data", "model", "prompt"):
        assert getattr(one, section) == getattr(two, section)
    for section in ("sft", "reward", "ppo"):
        assert getattr(one, section).model_dump(exclude=cut) == getattr(two, section).model_dump(exclude=cut)


def test_a_stopped_stage_saves_before_its_grace_ends(documents: Documents, tmp_path: Path) -> None:
    within = settings(documents, tmp_path).runtime.stop_within_seconds
    stages = [t for name, t in pod_templates(documents) if not name.startswith("Deployment")]
    assert len(stages) == 6
    for template in stages:
        # The launcher gives its processes 15 seconds more before it kills them, and needs some itself.
        assert template["spec"]["terminationGracePeriodSeconds"] >= within + 30


def test_settings_are_a_presets_with_few_changes(documents: Documents) -> None:
    text = find(documents, "ConfigMap", "rlhf-config")["data"]["config.yaml"]
    assert any(f"extends: {name}\n" in text for name in preset_names())


def test_the_environment_is_what_the_manifests_mount(documents: Documents) -> None:
    data = find(documents, "ConfigMap", "rlhf-environment")["data"]
    (mounts,) = {
        tuple((m["name"], m["mountPath"]) for m in c["volumeMounts"] if m["name"] in ("runs", "config"))
        for name, t in pod_templates(documents) if not name.startswith("Deployment") for c in containers(t)
    }  # fmt: skip
    assert dict(mounts) == {"runs": data["RLHF_RUNS_DIR"], "config": str(Path(data["RLHF_CONFIG"]).parent)}
    assert Path(data["RLHF_CONFIG"]).name in find(documents, "ConfigMap", "rlhf-config")["data"]
    assert all(isinstance(value, str) for value in data.values())
    assert len(of_kind(documents, "ConfigMap")) == 2
