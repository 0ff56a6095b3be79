"""Overlays are found and rendered, or it is said why not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rlhf.cluster import render
from rlhf.cluster.documents import workload
from rlhf.cluster.edits import spans_nodes
from rlhf.errors import ConfigError, UnavailableError, UsageError
from rlhf.pipeline import STAGE_NAMES, STAGES
from tests.conftest import REPOSITORY
from tests.manifests import OVERLAYS


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    folder = tmp_path / "k8s" / "overlays" / "mine"
    folder.mkdir(parents=True)
    document = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n"
    (folder / "map.yaml").write_text(document, encoding="utf-8")
    (folder / "kustomization.yaml").write_text("resources: [map.yaml]\n", encoding="utf-8")
    return tmp_path / "k8s"


@pytest.fixture
def kubectl() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; it renders the overlays (version 1.29 or newer)")


def test_overlays_are_found_by_name_and_by_folder(manifests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = manifests / "overlays" / "mine"
    assert render.overlay_folder("mine", manifests) == mine
    assert render.overlay_folder(str(mine), None) == mine
    monkeypatch.chdir(mine.parent)
    assert render.overlay_folder("./mine", None).resolve() == mine
    assert render.overlay_folder("local-cpu", None) == REPOSITORY / "k8s" / "overlays" / "local-cpu"


def test_an_unknown_overlay_names_the_nearest_or_all(manifests: Path) -> None:
    with pytest.raises(UsageError, match=r"--overlay mime: no such overlay; did you mean mine\?"):
        render.overlay_folder("mime", manifests)
    with pytest.raises(UsageError, match="there are mine; or give a folder"):
        render.overlay_folder("production", manifests)


def test_an_installed_package_without_manifests_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "__file__", str(tmp_path / "site-packages" / "rlhf" / "cluster" / "render.py"))
    with pytest.raises(UsageError, match="in a checkout of the project, or name its k8s folder with --manifests"):
        render.overlay_folder("local-cpu", None)


def test_without_kubectl_the_remedy_is_named(manifests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match="kubectl is not on the PATH: it renders the manifests; install"):
        render.kustomize(manifests / "overlays" / "mine")


def test_a_kubectl_that_does_not_run_is_named(manifests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = manifests / "kubectl"
    broken.write_text("no program", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(manifests) + os.pathsep + os.environ["PATH"])
    with pytest.raises(UnavailableError, match=r"kubectl kustomize .* did not run: .*Exec format error"):
        render.kustomize(manifests / "overlays" / "mine")


@pytest.mark.usefixtures("kubectl")
def test_a_broken_overlay_is_told_in_kubectls_words(manifests: Path) -> None:
    folder = manifests / "overlays" / "mine"
    assert [document["kind"] for document in render.kustomize(folder)] == ["ConfigMap"]
    (folder / "map.yaml").unlink()
    with pytest.raises(ConfigError, match=r"overlay .*mine cannot be rendered; .*map.yaml"):
        render.kustomize(folder)


@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "jobset"])
def test_every_overlay_has_a_job_for_each_stage_and_shared_ones_span_nodes(overlay: str) -> None:
    documents = render.kustomize(render.overlay_folder(overlay, None))
    jobs = {stage: workload(documents, stage) for stage in STAGE_NAMES}
    assert {stage for stage, job in jobs.items() if job and spans_nodes(job)} == {
        stage.name for stage in STAGES if stage.parallel
    }
    assert all(job is not None and job["metadata"]["name"] == f"rlhf-{stage}" for stage, job in jobs.items())
