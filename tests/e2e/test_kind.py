"""How a kind cluster is made and taken away, with programs on the PATH that only note what they were told."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.e2e import kind

IMAGE = "rlhf-summarizer:0.1.0-cpu"
# Notes its call; fails if the file `fails` begins it so; `kind create` writes the kubeconfig that kubectl answers with.
FAKE = """#!/bin/sh
PATH=/usr/bin:/bin
call="$(basename "$0") $*"
echo "$call" >>"{folder}/log"
fails=$(cat "{folder}/fails")
case "$call" in
  "${{fails:-nothing}}"*) echo "no luck with $call" >&2; exit 3 ;;
  "kind create cluster "*) echo made >"$6" ;;
  "kind get clusters") cat "{folder}/clusters" ;;
  "kubectl get --raw "*) test -s "$KUBECONFIG" ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with fakes of kind, docker and kubectl; their calls are in `log`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("log", "clusters", "fails"):
        (folder / name).touch()
    for name in ("kind", "docker", "kubectl"):
        path = folder / name
        path.write_text(FAKE.format(folder=folder), encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def environment(tools: Path) -> dict[str, str]:
    return {"PATH": str(tools), "KUBECONFIG": str(tools / "none")}


def calls(tools: Path) -> list[str]:
    return (tools / "log").read_text(encoding="utf-8").splitlines()


def test_a_cluster_is_made_with_the_image_and_taken_away(tools: Path, tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    with kind.cluster(environment(tools), IMAGE, tmp_path) as reached:
        assert reached["KUBECONFIG"] == str(config)
        assert kind.answers(reached)
        assert not any(call.startswith("kind delete") for call in calls(tools))
    assert [call for call in calls(tools) if call.startswith(("kind create", "kind load", "kind delete"))] == [
        f"kind create cluster --name rlhf-e2e --kubeconfig {config} --wait 180s",
        f"kind load docker-image {IMAGE} --name rlhf-e2e",
        f"kind delete cluster --name rlhf-e2e --kubeconfig {config}",
    ]


def test_a_cluster_that_answers_is_used_as_it_is(tools: Path, tmp_path: Path) -> None:
    (tools / "none").write_text("a cluster", encoding="utf-8")
    with kind.cluster(environment(tools), IMAGE, tmp_path) as reached:
        assert reached == environment(tools)
    assert calls(tools) == ["kubectl get --raw /version --request-timeout=10s"]


def test_it_is_taken_away_when_the_tests_break_off(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), kind.cluster(environment(tools), IMAGE, tmp_path):
        raise KeyboardInterrupt
    assert calls(tools)[-1].startswith("kind delete cluster --name rlhf-e2e")


@pytest.mark.parametrize("call", ["kind create cluster", "kind load docker-image"])
def test_a_cluster_that_is_not_whole_is_taken_away(tools: Path, tmp_path: Path, call: str) -> None:
    (tools / "fails").write_text(call, encoding="utf-8")
    with (
        pytest.raises(kind.NoCluster, match="ended with 3: no luck with kind"),
        kind.cluster(environment(tools), IMAGE, tmp_path),
    ):
        pytest.fail("there is no cluster")
    assert calls(tools)[-1].startswith("kind delete cluster --name rlhf-e2e")


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("kind", "kind is not on the PATH"),
        ("docker", "docker is not on the PATH"),
        ("docker info", "Docker is not running"),
        ("docker image inspect", "`make image ACCELERATOR=cpu` builds it"),
    ],
)
def test_what_is_missing_is_named(tools: Path, tmp_path: Path, missing: str, reason: str) -> None:
    if " " in missing:
        (tools / "fails").write_text(missing, encoding="utf-8")
    else:
        (tools / missing).unlink()
    with pytest.raises(kind.NoCluster, match=reason), kind.cluster(environment(tools), IMAGE, tmp_path):
        pytest.fail("there is no cluster")
    assert not any(call.startswith(("kind create", "kind delete")) for call in calls(tools))


def test_a_cluster_left_by_somebody_else_is_left_alone(tools: Path, tmp_path: Path) -> None:
    (tools / "clusters").write_text("other\nrlhf-e2e\n", encoding="utf-8")
    with (
        pytest.raises(kind.NoCluster, match="kind delete cluster --name rlhf-e2e"),
        kind.cluster(environment(tools), IMAGE, tmp_path),
    ):
        pytest.fail("there is no cluster")
    assert not any(call.startswith(("kind create", "kind delete")) for call in calls(tools))
