"""All stages as one JobSet that keeps their order itself: `python -m rlhf.cluster.jobset k8s/base`.

For clusters where nobody stays to run `rlhf deploy all`. Written from the Jobs, so that a stage is described once;
`make docs` writes k8s/overlays/jobset/jobset.yaml.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import yaml

from rlhf.pipeline import STAGE_NAMES

NAME = "rlhf"
HEADER = """\
# Written by `make docs` from the Jobs in k8s/base; do not edit.
# Needs JobSet 0.8 or newer. A stage starts when the one before is complete; one that fails ends the whole.
"""


def job_set(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A JobSet of the stages' Jobs, by stage name, in the pipeline's order."""
    labels = dict(jobs[STAGE_NAMES[0]]["metadata"]["labels"])
    labels["app.kubernetes.io/component"] = "pipeline"
    metadata = {"name": NAME, "namespace": jobs[STAGE_NAMES[0]]["metadata"]["namespace"], "labels": labels}
    replicated = []
    for number, stage in enumerate(STAGE_NAMES):
        entry: dict[str, Any] = {"name": stage, "replicas": 1}
        if number:
            entry["dependsOn"] = [{"name": STAGE_NAMES[number - 1], "status": "Complete"}]
        entry["template"] = {"metadata": {"labels": jobs[stage]["metadata"]["labels"]}, "spec": _spec(jobs[stage])}
        replicated.append(entry)
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": NAME, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": 0},
        "ttlSecondsAfterFinished": jobs[STAGE_NAMES[0]]["spec"]["ttlSecondsAfterFinished"],
        "replicatedJobs": replicated,
    }
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _spec(job: dict[str, Any]) -> dict[str, Any]:
    """A Job's spec as a JobSet wants it: lifetime and host names are the JobSet's."""
    spec = copy.deepcopy(job["spec"])
    del spec["ttlSecondsAfterFinished"]
    pod = spec["template"]["spec"]
    stage = job["metadata"]["labels"]["app.kubernetes.io/component"]
    subdomain = pod.pop("subdomain", None)
    for container in pod["initContainers"] + pod["containers"]:
        for variable in container["env"]:
            if variable["name"] == "RLHF_RENDEZVOUS":
                port = variable["value"].rpartition(":")[2]
                variable["value"] = f"{NAME}-{stage}-0-0.{NAME}:{port}"
                assert subdomain is not None
    return spec


def read_jobs(base: Path) -> dict[str, dict[str, Any]]:
    """The Jobs of the manifests in a folder, by stage."""
    jobs = {}
    for stage in STAGE_NAMES:
        documents = yaml.safe_load_all((base / f"{stage}-job.yaml").read_text(encoding="utf-8"))
        jobs[stage] = next(document for document in documents if document["kind"] == "Job")
    return jobs


def main() -> None:
    """Print the JobSet."""
    sys.stdout.write(HEADER + yaml.safe_dump(job_set(read_jobs(Path(sys.argv[1]))), sort_keys=False, width=120))


if __name__ == "__main__":
    main()
