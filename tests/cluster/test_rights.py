"""The Role that the manifests bring suffices, and accounts without it are told what they lack."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.cluster.api import JOB, Cluster
from rlhf.cluster.documents import SERVICES, component
from tests.cluster.conftest import LOCAL, Run
from tests.cluster.control_plane import PERSON, ControlPlane
from tests.cluster.kubelet import Fate, Kubelet


def test_the_role_suffices(
    rlhf: Run, cluster: Cluster, kubelet: Kubelet, kubectl: Callable[..., str], plane: ControlPlane, capsys, monkeypatch
) -> None:
    assert rlhf("deploy", "tensorboard", *LOCAL) == 0  # the administrator brings namespace and Role
    kubectl("create", "rolebinding", "people", "--role=rlhf-deployer", f"--user={PERSON}")
    kubelet.play(cluster.namespace, lambda pod: Fate(None if component(pod) in SERVICES else 0, lines=("a line",)))
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig(PERSON)))
    for part in ("all", "api"):
        assert rlhf("deploy", part, *LOCAL, "--dry-run") == 0
    capsys.readouterr()
    assert rlhf("deploy", "fetch", *LOCAL, "--follow") == 0
    printed = capsys.readouterr()
    assert printed.out == "a line\n"
    assert printed.err.splitlines()[-1] == "fetch is done"
    assert rlhf("deploy", "fetch", *LOCAL, "--set", "seed=3", "--wait") == 0  # replaces what is complete
    assert rlhf("cluster-status") == 0
    assert "may not" not in capsys.readouterr().out
    assert rlhf("cluster-logs", "fetch") == 0
    assert rlhf("undeploy") == 0
    assert cluster.list(JOB) == []


def test_whoever_lacks_a_right_is_told_which(rlhf: Run, cluster: Cluster, plane, monkeypatch, capsys) -> None:
    assert rlhf("deploy", "tensorboard", *LOCAL) == 0
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig(PERSON)))
    capsys.readouterr()
    assert rlhf("deploy", "fetch", *LOCAL) == 69
    said = capsys.readouterr().err
    expected = (
        'the cluster does not allow it: jobs.batch "rlhf-fetch" is forbidden: User "deployer" cannot get resource'
    )
    assert expected in said
    assert len(said.splitlines()) == 1


def test_whoever_is_not_known_is_told_to_log_in(rlhf: Run, plane: ControlPlane, monkeypatch, tmp_path, capsys) -> None:
    stale = plane.kubeconfig(PERSON).read_text(encoding="utf-8").replace("token: ", "token: X")
    (tmp_path / "config").write_text(stale, encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert rlhf("cluster-status") == 69
    assert "does not know you (Unauthorized); log in again, or choose another --context" in capsys.readouterr().err
