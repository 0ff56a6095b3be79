"""Requests to the API: what passes is tried again, what does not is one line."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes.client import ApiClient, Configuration

from rlhf.cluster import api
from rlhf.cluster.api import CLAIM, JOB, POD, ApiRefusal, Cluster, Kind
from rlhf.cluster.kubeconfig import connect
from rlhf.errors import ConfigError, UnavailableError

RESET = object()
HALF = object()
BATCH = {"resources": [{"name": "jobs", "kind": "Job", "namespaced": True}, {"name": "jobs/status", "kind": "Job"}]}
CORE = {
    "resources": [
        {"name": "pods", "kind": "Pod", "namespaced": True},
        {"name": "persistentvolumeclaims", "kind": "PersistentVolumeClaim", "namespaced": True},
        {"name": "namespaces", "kind": "Namespace", "namespaced": False},
    ]
}


class Server:
    """An API server that knows Jobs, and answers with what a test has written down."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[tuple[str, str, dict[str, list[str]], Any]] = []
        self.headers: dict[str, str] = {}
        self.content_type = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                address = urlsplit(self.path)
                if address.path in ("/apis/batch/v1", "/api/v1"):
                    return self.send(200, BATCH if "batch" in address.path else CORE)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.content_type = self.headers.get("Content-Type", "")
                outer.requests.append(
                    (self.command, address.path, parse_qs(address.query), json.loads(body) if body else None)
                )
                answer = outer.answers.pop(0) if outer.answers else (404, {"message": "not found"})
                if answer is RESET:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return None
                return self.send(200, {"items": []}, cut=5) if answer is HALF else self.send(*answer)

            def send(self, status: int, document: Any, cut: int = 0) -> None:
                text = json.dumps(document).encode()
                self.send_response(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text[: len(text) - cut])
                if cut:
                    self.close_connection = True

            do_GET = do_PATCH = do_DELETE = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def cluster(server: Server, told: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(api, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(api, "LONGEST_PAUSE_SECONDS", 0.01)
    settings = Configuration(host=server.address)
    settings.retries = False
    cluster = Cluster(ApiClient(settings), "team", told.append)
    yield cluster
    cluster.close()


def refusal(status: int, message: str) -> tuple[int, dict[str, str]]:
    return status, {"kind": "Status", "message": message}


def test_objects_are_found_by_name_and_by_label(cluster: Cluster, server: Server) -> None:
    server.answers = [(200, {"kind": "Job"}), refusal(404, "no"), (200, {"items": [{"metadata": {"name": "x"}}]})]
    assert cluster.get(JOB, "x") == {"kind": "Job"}
    assert cluster.get(JOB, "y") is None
    assert cluster.list(POD, labels="a=b,c=d") == [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}]
    assert [(method, path) for method, path, _, _ in server.requests] == [
        ("GET", "/apis/batch/v1/namespaces/team/jobs/x"),
        ("GET", "/apis/batch/v1/namespaces/team/jobs/y"),
        ("GET", "/api/v1/namespaces/team/pods"),
    ]
    assert server.requests[2][2] == {"labelSelector": ["a=b,c=d"]}


def test_what_passes_is_tried_again(cluster: Cluster, server: Server, told: list[str]) -> None:
    cluster.knows(JOB)  # has answered once
    server.answers = [
        RESET,
        refusal(503, "starting"),
        refusal(429, "slowly"),
        HALF,
        refusal(500, "etcd"),
        (200, {"a": 1}),
    ]
    assert cluster.get(JOB, "x") == {"a": 1}
    assert len(server.requests) == 6
    assert "does not answer" in told[0]
    assert told[0].endswith("trying again for up to 180 seconds")
    assert "cannot answer now (HTTP 503): starting" in told[1]


def test_patience_ends(cluster: Cluster, server: Server) -> None:
    cluster.knows(JOB)
    cluster.patience_seconds = 0
    server.answers = [RESET, RESET]
    with pytest.raises(UnavailableError, match=f"the cluster at {server.address} does not answer: "):
        cluster.get(JOB, "x")


def test_an_address_that_never_answered_is_given_up_soon(
    cluster: Cluster, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "FIRST_PATIENCE_SECONDS", 0.05)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        cluster.client.configuration.host = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=r"does not answer: .*Connection refused") as error:
            cluster.list(JOB)
    assert error.value.exit_code == 69


@pytest.mark.parametrize(
    ("status", "message", "line"),
    [
        (401, "Unauthorized", "does not know you (Unauthorized); log in again, or choose another --context"),
        (403, 'User "x" cannot list resource "jobs"', 'does not allow it: User "x" cannot list resource "jobs"'),
        (422, "Job is\n invalid", "Job is invalid"),
    ],
)
def test_what_does_not_pass_is_one_line_at_once(
    cluster: Cluster, server: Server, status: int, message: str, line: str
) -> None:
    server.answers = [refusal(status, message)]
    with pytest.raises(ApiRefusal) as error:
        cluster.list(JOB)
    assert (error.value.status, error.value.exit_code, len(server.requests)) == (status, 69, 1)
    assert str(error.value).endswith(line)


def test_a_server_that_has_just_come_back_may_not_know_accounts_yet(cluster: Cluster, server: Server) -> None:
    server.answers = [RESET, refusal(403, "not yet"), refusal(401, "not yet"), (200, {"items": []})]
    assert cluster.list(JOB) == []


def test_an_error_that_is_no_json_is_still_told(cluster: Cluster, server: Server) -> None:
    server.answers = [(400, "a proxy's page")]
    with pytest.raises(ApiRefusal, match="a proxy's page"):
        cluster.list(JOB)


def test_apply_states_its_manager_and_takes_over_only_when_told(cluster: Cluster, server: Server) -> None:
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    server.answers = [(200, {}), (200, {})]
    cluster.apply(document)
    cluster.apply(document, dry_run=True, force=True)
    assert [query for _, _, query, _ in server.requests] == [
        {"fieldManager": ["rlhf-deploy"], "force": ["false"]},
        {"fieldManager": ["rlhf-deploy"], "force": ["true"], "dryRun": ["All"]},
    ]
    assert server.requests[0][:2] == ("PATCH", "/apis/batch/v1/namespaces/team/jobs/x")
    assert server.requests[0][3] == document
    assert server.content_type == "application/apply-patch+yaml"


def test_delete_means_one_object_and_does_not_mind_when_it_is_gone(cluster: Cluster, server: Server) -> None:
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    server.answers = [refusal(404, "gone"), refusal(409, "another uid"), refusal(403, "no")]
    cluster.delete(document)
    cluster.delete(document, uid="u", propagation="Foreground")
    with pytest.raises(ApiRefusal):
        cluster.delete(document)
    body = server.requests[1][3]
    assert (body["preconditions"], body["propagationPolicy"]) == ({"uid": "u"}, "Foreground")


def test_kinds_that_are_not_installed_are_named(cluster: Cluster, server: Server) -> None:
    assert cluster.knows(CLAIM)
    assert not cluster.knows(Kind("keda.sh/v1alpha1", "ScaledObject"))
    with pytest.raises(
        ConfigError, match=r"the cluster has no ScaledObject of keda.sh/v1alpha1: install what brings it"
    ):
        cluster.list(Kind("keda.sh/v1alpha1", "ScaledObject"))
    assert cluster.is_namespaced({"apiVersion": "v1", "kind": "Pod"})
    assert not cluster.is_namespaced({"apiVersion": "v1", "kind": "Namespace"})


def test_warnings_of_the_server_are_told(cluster: Cluster, server: Server, told: list[str]) -> None:
    server.headers = {"Warning": '299 - "would violate PodSecurity \\"restricted\\""'}
    server.answers = [(200, {"items": []})]
    cluster.list(JOB)
    assert told[-1] == 'the cluster warns: would violate PodSecurity "restricted"'


def test_without_a_kubeconfig_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(UnavailableError, match=r"no cluster is named: .*; set KUBECONFIG or --context"):
        connect(None, "team", print)
    (tmp_path / "absent").write_text("{", encoding="utf-8")
    with pytest.raises(UnavailableError, match="no cluster is named"):
        connect(None, "team", print)


def test_an_unknown_context_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    names = [{"name": "there", "context": {"cluster": "c", "user": "u"}}]
    config = {"current-context": "there", "contexts": names, "clusters": [], "users": []}
    (tmp_path / "config").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(UnavailableError, match=r"Expected object with name elsewhere in .*contexts list"):
        connect("elsewhere", "team", print)
