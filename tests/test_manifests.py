"""The manifests hold together: what one names another has, and the programs understand what they are told."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.__main__ import build_parser as build_service_parser
from app.settings import Settings
from rlhf import __version__, errors
from rlhf.__main__ import STAGE_HELP, build_parser
from rlhf.cluster.jobset import HEADER, job_set, read_jobs
from rlhf.pipeline import STAGE_NAMES, STAGES
from tests import manifests
from tests.conftest import REPOSITORY
from tests.manifests import (
    BASE,
    COMPONENTS,
    FILES,
    MANIFESTS,
    OVERLAYS,
    Documents,
    base,
    containers,
    environment,
    find,
    of_kind,
    pod_templates,
)

# Kinds that Kubernetes itself does not know; whoever adds one looks its schema up.
CUSTOM = {
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "ScaledObject": "keda.sh/v1alpha1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
}
OLDEST, NEWEST = "1.29", "1.37"
COMPONENT = "app.kubernetes.io/component"
LABELS = {f"app.kubernetes.io/{key}" for key in ("name", "part-of", "version", "component")}
TINI = ["/usr/bin/tini", "--"]
SHARED_STAGES = {stage.name for stage in STAGES if stage.parallel}


@pytest.fixture(
    params=["base", "extras", *(f"overlay {name}" for name in OVERLAYS), *(f"component {c}" for c in COMPONENTS)]
)
def documents(request: pytest.FixtureRequest) -> Documents:
    kind, _, name = request.param.partition(" ")
    if kind in ("base", "extras"):
        return base() if kind == "base" else manifests.extras()
    return manifests.overlay(name) if kind == "overlay" else manifests.component(name)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field(documents: Documents, version: str) -> None:
    for document in documents:
        if document["kind"] in CUSTOM:
            assert document["apiVersion"] == CUSTOM[document["kind"]]
            continue
        kubernetes_validate.validate(document, version, strict=True)


def test_objects_are_labelled_alike(documents: Documents) -> None:
    everything = [document["metadata"] for document in documents] + [t["metadata"] for _, t in pod_templates(documents)]
    for metadata in everything:
        assert set(metadata["labels"]) >= LABELS, metadata
        assert metadata["labels"]["app.kubernetes.io/name"] == "rlhf"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "rlhf-summarizer"
        assert metadata["labels"]["app.kubernetes.io/version"] == __version__
    components = {document["metadata"]["labels"]["app.kubernetes.io/component"] for document in documents}
    assert components <= {*STAGE_NAMES, "api", "tensorboard", "shared", "pipeline", "volume"}


def test_all_live_in_one_namespace(documents: Documents) -> None:
    cluster_wide = {"Namespace", "StorageClass"}
    assert {d["metadata"].get("namespace") for d in documents if d["kind"] not in cluster_wide} == {"rlhf"}
    assert (
        find(documents, "Namespace", "rlhf")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )


def test_selectors_meet_pods(documents: Documents) -> None:
    labels = [template["metadata"]["labels"] for _, template in pod_templates(documents)]

    def chosen(selector: dict[str, str]) -> list[dict[str, str]]:
        return [pod for pod in labels if selector.items() <= pod.items()]

    for document in of_kind(documents, "Service"):
        assert chosen(document["spec"]["selector"]), document["metadata"]["name"]
    for document in of_kind(documents, "Deployment", "PodDisruptionBudget"):
        (pod,) = chosen(document["spec"]["selector"]["matchLabels"])
        assert pod["app.kubernetes.io/component"] == document["metadata"]["labels"]["app.kubernetes.io/component"]
    for document in of_kind(documents, "ServiceMonitor"):
        (service,) = (
            s for s in of_kind(documents, "Service")
            if document["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
        )  # fmt: skip
        assert document["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    for document in of_kind(documents, "ScaledObject"):
        find(documents, "Deployment", document["spec"]["scaleTargetRef"]["name"])
    for _, template in pod_templates(documents):
        for spread in template["spec"].get("topologySpreadConstraints", []):
            assert spread["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_everything_that_is_named_exists(documents: Documents) -> None:
    keys = {d["metadata"]["name"]: set(d["data"]) for d in of_kind(documents, "ConfigMap")}
    claims = {d["metadata"]["name"] for d in of_kind(documents, "PersistentVolumeClaim")}
    accounts = {d["metadata"]["name"] for d in of_kind(documents, "ServiceAccount")}
    made_by_hand = {"rlhf-api-keys"}
    for name, template in pod_templates(documents):
        pod = template["spec"]
        assert pod["serviceAccountName"] in accounts, name
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert "config.yaml" in keys[volume["configMap"]["name"]]
            if "secret" in volume:
                assert volume["secret"].get("optional") or volume["secret"]["secretName"] in made_by_hand
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in containers(template) for mount in container["volumeMounts"]}
        assert mounted == volumes, name
        for container in containers(template):
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in keys
            for entry in container.get("env", []):
                if reference := entry.get("valueFrom", {}).get("configMapKeyRef"):
                    assert reference["key"] in keys[reference["name"]]


def test_named_ports_exist(documents: Documents) -> None:
    for service in of_kind(documents, "Service"):
        pods = [
            template for _, template in pod_templates(documents)
            if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ]  # fmt: skip
        for port in service["spec"]["ports"]:
            if isinstance(target := port.get("targetPort"), str):
                named = {p["name"]: p["containerPort"] for t in pods for c in containers(t) for p in c.get("ports", [])}
                assert named[target] == port["port"]
    for _, template in pod_templates(documents):
        for container in containers(template):
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports


def test_pods_are_restricted(documents: Documents) -> None:
    templates = dict(pod_templates(documents))
    assert templates
    for name, template in templates.items():
        pod = template["spec"]
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}, name
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {key for v in pod["volumes"] for key in v} - {"name"} <= {
            "persistentVolumeClaim", "configMap", "secret", "emptyDir"
        }  # fmt: skip
        for container in containers(template):
            assert container["securityContext"] == {
                "runAsNonRoot": True,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_requests_and_limits(documents: Documents) -> None:
    for name, template in pod_templates(documents):
        for container in containers(template):
            resources = container["resources"]
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= resources[kind].keys(), name
            gpus = "nvidia.com/gpu"
            assert resources["requests"].get(gpus) == resources["limits"].get(gpus)
            if "RLHF_GPUS" in environment(container):
                assert environment(container)["RLHF_GPUS"] == str(resources["limits"].get(gpus, 0)), name
        tolerated = {toleration.get("key") for toleration in template["spec"].get("tolerations") or []}
        wanted = any("nvidia.com/gpu" in container["resources"]["limits"] for container in containers(template))
        assert ("nvidia.com/gpu" in tolerated) == wanted, name


def test_images_are_pinned(documents: Documents) -> None:
    for name, template in pod_templates(documents):
        for container in containers(template):
            assert re.fullmatch(rf"rlhf-summarizer:{re.escape(__version__)}-(cuda|cpu)", container["image"]), name


def test_programs_understand_their_arguments(documents: Documents) -> None:
    for name, template in pod_templates(documents):
        for container in containers(template):
            arguments = container.get("args", [])
            if "command" not in container:
                options = build_parser().parse_args(arguments)
                component = template["metadata"]["labels"]["app.kubernetes.io/component"]
                assert options.stage == component, name
                continue
            assert container["command"][:2] == TINI
            program = container["command"][2:]
            if program == ["python", "-m", "app"]:
                build_service_parser().parse_args(arguments)
            elif program == ["tensorboard"]:
                assert "--logdir=/runs" in arguments
            else:
                assert program[0] == "sleep"
                assert int(program[1]) == template["spec"]["activeDeadlineSeconds"]


def jobs(documents: Documents) -> list[tuple[str, dict[str, Any], bool]]:
    """Stage, spec of its Job, and whether it stands in a JobSet, which names hosts in its own way."""
    found = [
        (d["metadata"]["labels"]["app.kubernetes.io/component"], d["spec"], False) for d in of_kind(documents, "Job")
    ]
    for document in of_kind(documents, "JobSet"):
        found += [(job["name"], job["template"]["spec"], True) for job in document["spec"]["replicatedJobs"]]
    return found


def test_every_stage_has_a_job(documents: Documents) -> None:
    assert [name for name, *_ in sorted(jobs(documents), key=lambda job: STAGE_NAMES.index(job[0]))] == list(
        STAGE_NAMES
    )


def test_nodes_and_ranks_agree(documents: Documents) -> None:
    for stage, spec, in_job_set in jobs(documents):
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"]
        for container in containers(spec["template"]):
            variables = environment(container)
            assert variables.get("RLHF_NODES", "1") == str(spec["completions"]), stage
            if stage not in SHARED_STAGES:
                assert not variables.keys() & {"RLHF_NODES", "RLHF_RENDEZVOUS"}
                continue
            host, _, port = variables["RLHF_RENDEZVOUS"].partition(":")
            if in_job_set:
                assert host == f"rlhf-{stage}-0-0.rlhf"
                continue
            service = find(documents, "Service", f"rlhf-{stage}")
            assert host == f"rlhf-{stage}-0.{spec['template']['spec']['subdomain']}"
            assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
            assert service["spec"]["clusterIP"] == "None"
            assert service["spec"]["publishNotReadyAddresses"] is True
            assert [p["port"] for p in service["spec"]["ports"]] == [int(port)]


def exit_codes() -> dict[str, int]:
    return {name: kind.exit_code for name, kind in vars(errors).items() if isinstance(kind, type)}


def test_what_a_failed_pod_means(documents: Documents) -> None:
    codes = exit_codes()
    permanent = sorted(codes[name] for name in ("UsageError", "DataError", "PrerequisiteError", "ConfigError"))
    for stage, spec, in_job_set in jobs(documents):
        rules = spec["podFailurePolicy"]["rules"]
        assert rules[0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": permanent}}, stage
        assert rules[1]["action"] == "Ignore"
        assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert rules[2] == {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [codes["StopRequested"]]}}
        assert len(rules) == 3
        assert spec["podReplacementPolicy"] == "Failed"
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        assert spec["backoffLimit"] > 0
        assert spec["activeDeadlineSeconds"] > 3600
        assert ("ttlSecondsAfterFinished" in spec) != in_job_set


def test_messages_reach_describe(documents: Documents) -> None:
    for _, template in pod_templates(documents):
        for container in containers(template):
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def service_settings(documents: Documents, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> Settings:
    (container,) = find(documents, "Deployment", "rlhf-api")["spec"]["template"]["spec"]["containers"]
    variables = environment(container)
    assert variables["APP_RUN_DIR"] == "/runs/$(RLHF_RUN)"
    order = [entry["name"] for entry in container["env"]]
    assert order.index("RLHF_RUN") < order.index("APP_RUN_DIR")  # Kubernetes expands what stands above
    for name in [name for name in os.environ if name.startswith("APP_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(run_dir) if name == "APP_RUN_DIR" else value)
    return Settings.from_environment()


def test_the_service_leaves_in_time(documents: Documents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = service_settings(documents, monkeypatch, tmp_path)
    pod = find(documents, "Deployment", "rlhf-api")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    # docs/service.md: with a hung model the process leaves 6 seconds after its drain.
    assert pod["terminationGracePeriodSeconds"] >= int(command[1]) + settings.drain_seconds + 10
    readiness = container["readinessProbe"]
    assert int(command[1]) >= readiness["periodSeconds"] * readiness["failureThreshold"]
    (port,) = container["ports"]
    assert settings.port == port["containerPort"]


def test_the_service_is_told_of_the_gpus_it_has(
    documents: Documents, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = service_settings(documents, monkeypatch, tmp_path)
    (container,) = find(documents, "Deployment", "rlhf-api")["spec"]["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
    used = {settings.policy_device, settings.reward_device}
    assert used == ({f"cuda:{number}" for number in range(gpus)} or {"cpu"})


def test_probes_are_the_services_own() -> None:
    from app.connections import PROBES

    (container,) = find(base(), "Deployment", "rlhf-api")["spec"]["template"]["spec"]["containers"]
    named = [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert named == ["/startupz", "/readyz", "/livez"]
    assert set(named) == set(PROBES)


def test_a_rolling_update_leaves_no_gap(documents: Documents) -> None:
    spec = find(documents, "Deployment", "rlhf-api")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    probe = spec["template"]["spec"]["containers"][0]["startupProbe"]
    assert spec["progressDeadlineSeconds"] >= probe["periodSeconds"] * probe["failureThreshold"]


def test_only_fetch_reaches_out_and_only_the_service_is_reached() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in of_kind(base(), "NetworkPolicy")}
    assert policies.pop("rlhf-default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def ports(rules: list[dict[str, Any]]) -> set[int | None]:
        return {port["port"] for rule in rules if "to" not in rule and "from" not in rule for port in rule["ports"]}

    outward = {name: ports(spec.get("egress", [])) - {53} for name, spec in policies.items()}
    assert {name: found for name, found in outward.items() if found} == {"rlhf-fetch": {443}}
    inward = {name: ports(spec.get("ingress", [])) for name, spec in policies.items()}
    assert {name: found for name, found in inward.items() if found} == {"rlhf-api": {8000}}


def test_ranks_meet_and_reach_the_service_that_scores() -> None:
    spec = find(base(), "NetworkPolicy", "rlhf-ranks")["spec"]
    ranks = spec["podSelector"]
    (expression,) = ranks["matchExpressions"]
    assert (expression["key"], expression["operator"]) == (COMPONENT, "In")
    assert set(expression["values"]) == SHARED_STAGES
    assert spec["ingress"] == [{"from": [{"podSelector": ranks}]}]
    among, scores, names = spec["egress"]
    assert among == {"to": [{"podSelector": ranks}]}  # on any port: NCCL and gloo choose
    assert scores["to"] == [{"podSelector": {"matchLabels": {COMPONENT: "api"}}}]
    (port,) = find(base(), "Service", "rlhf-api")["spec"]["ports"]
    assert scores["ports"] == [{"port": port["port"], "protocol": "TCP"}]
    assert names == {"ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]}


def test_each_file_applies_alone() -> None:
    links = {path.name: os.readlink(path) for path in MANIFESTS.glob("*.yaml") if path.is_symlink()}
    assert links == {path.name: f"base/{path.name}" for path in FILES}
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted(listed) == [path.name for path in FILES]
    assert {f"{stage}-job.yaml" for stage in STAGE_NAMES} <= set(links)


def test_stages_are_commands_and_make_targets() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^DEPLOYMENTS := (.*)$", makefile, re.MULTILINE)
    assert targets.split() == [f"deploy-{name}" for name in (*STAGE_NAMES, "api", "tensorboard", "all")]
    assert tuple(STAGE_HELP) == STAGE_NAMES


def test_the_job_set_is_made_of_the_jobs() -> None:
    written = (MANIFESTS / "overlays" / "jobset" / "jobset.yaml").read_text(encoding="utf-8")
    assert written.startswith(HEADER), "write it again: make docs"
    assert yaml.safe_load(written) == job_set(read_jobs(BASE)), "write it again: make docs"


def test_the_job_set_keeps_the_order() -> None:
    replicated = job_set(read_jobs(BASE))["spec"]["replicatedJobs"]
    assert [job["name"] for job in replicated] == list(STAGE_NAMES)
    before = [job.get("dependsOn") for job in replicated]
    assert before[0] is None
    assert before[1:] == [[{"name": stage, "status": "Complete"}] for stage in STAGE_NAMES[:-1]]


def test_the_job_set_makes_its_own_service() -> None:
    left = {d["metadata"]["name"] for d in of_kind(manifests.overlay("jobset"), "Service")}
    assert left == {"rlhf-api", "rlhf-tensorboard"}


def test_kueue_admits_the_jobs() -> None:
    found = of_kind(manifests.component("kueue"), "Job")
    assert len(found) == len(STAGE_NAMES)
    for job in found:
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rlhf"


def test_two_nodes_in_the_overlay_of_many() -> None:
    found = {stage: spec["completions"] for stage, spec, _ in jobs(manifests.overlay("multi-node"))}
    assert found == {"fetch": 1, "sft": 2, "reward": 2, "prepare": 1, "ppo": 2, "evaluate": 1}
