"""What surrounds the routes: request ids, the access log, bugs, bodies, CORS."""

import json
import logging
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi.testclient import TestClient

import app.body
from app.logs import RequestFormatter, RequestJsonFormatter
from app.requests import current_request_id, new_request_id
from app.settings import Settings
from tests.conftest import REPOSITORY
from tests.tiny_server import TinyService, connect, read_all, serving, tiny_app, until

MEGABYTE = b"a" * 2**20


@contextmanager
def client(**settings: object) -> Iterator[tuple[TestClient, TinyService]]:
    service = TinyService()
    app = tiny_app(service, Settings(run_dir=".", **settings))
    with TestClient(app, raise_server_exceptions=False) as asking:
        yield asking, service


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "app")
    return caplog


def facts(log: pytest.LogCaptureFixture) -> list[dict]:
    return [record.facts for record in log.records if record.name == "app.access"]


def answer_of(received: bytes) -> tuple[bytes, dict]:
    """The status line and the JSON body of what a raw socket received."""
    head, _, body = received.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], json.loads(body)


@pytest.mark.parametrize("given", ["abc-1.Z_", "x" * 64])
def test_a_fit_request_id_is_kept(given: str) -> None:
    with client() as (asking, _):
        assert asking.get("/livez", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 65, 'a"}{', "a\n"])
def test_another_is_replaced(given: str | None) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", new_request_id(given))


@pytest.mark.parametrize("path", ["/livez", "/nowhere", "/boom"])
def test_every_answer_carries_an_id_of_its_own(path: str) -> None:
    with client() as (asking, _):
        first, second = asking.get(path), asking.get(path)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    if first.status_code >= 400:
        assert first.json()["request_id"] == first.headers["x-request-id"]


def test_one_line_a_request_without_query_and_body(log: pytest.LogCaptureFixture) -> None:
    with client() as (asking, _):
        asking.post("/echo?token=hush", content=b"my secret", headers={"x-request-id": "r1"})
    (line,) = facts(log)
    assert line.pop("seconds") > 0
    assert line == {
        "method": "POST",
        "path": "/echo",
        "status": 200,
        "bytes_in": 9,
        "bytes_out": 11,
        "key": None,
        "client": "testclient",
        "request_id": "r1",
        "abandoned": False,
    }


def test_a_path_cannot_break_the_log(log: pytest.LogCaptureFixture) -> None:
    with client() as (asking, _):
        asking.get("/a%0Ab%22%C3%A9")
    assert [line["path"] for line in facts(log)] == ["/a%0Ab%22%C3%A9"]


def test_a_bug_is_a_500_without_its_traceback_which_the_log_has(log: pytest.LogCaptureFixture) -> None:
    with client() as (asking, service):
        answer = asking.get("/boom", headers={"x-request-id": "r2"})
        assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
        assert answer.json()["type"] == "/problems/internal"
        assert "secret" not in answer.text
        assert b'rlhf_http_requests_total{route="/boom",status="500"} 1.0' in service.metrics.render()
    (error,) = [record for record in log.records if record.levelno == logging.ERROR]
    assert "a secret of the service" in (error.exc_text or logging.Formatter().format(error))


def test_paths_that_are_not_there_share_one_label() -> None:
    with client() as (asking, service):
        asking.get("/no/1")
        asking.get("/no/2")
        assert b'rlhf_http_requests_total{route="other",status="404"} 2.0' in service.metrics.render()


def test_a_caller_who_leaves_is_noted() -> None:
    with serving() as (port, metrics):
        with connect(port) as connection:
            connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")
            connection.shutdown(socket.SHUT_RDWR)
        until(lambda: b"rlhf_requests_abandoned_total 1.0" in metrics.render())
        assert b'rlhf_http_requests_total{route="other",status="499"} 1.0' in metrics.render()


def test_log_lines_of_a_request_carry_its_id() -> None:
    record = logging.LogRecord("app.x", logging.INFO, "f", 1, "loaded", None, None)
    assert "request_id" not in json.loads(RequestJsonFormatter().format(record))
    record.facts = {"request_id": "r3", "seconds": 0.5}
    assert json.loads(RequestJsonFormatter().format(record))["request_id"] == "r3"
    assert RequestFormatter("%(message)s").format(record) == "loaded 0.500 s"
    assert current_request_id() == ""


def test_the_level_is_that_of_the_settings() -> None:
    code = (
        "import logging\nfrom app.logs import configure_service_logging\nconfigure_service_logging('warning')\n"
        "logging.getLogger('app.access').info('noise')\nlogging.getLogger('app.x').warning('kept')\n"
        "logging.getLogger('uvicorn.error').warning('also')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["kept", "also"]


@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
def test_the_refusal_of_a_100_mb_body_reaches_a_caller_who_sends_it_all_first(chunked: bool) -> None:
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\n")
        if chunked:
            connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(100):
                connection.sendall(b"100000\r\n" + MEGABYTE + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        else:
            connection.sendall(b"Content-Length: 104857600\r\n\r\n")
            for _ in range(100):
                connection.sendall(MEGABYTE)
        status, problem = answer_of(read_all(connection))
        assert (status.split()[1], problem["type"]) == (b"413", "/problems/body-too-large")


def test_a_large_body_is_refused_before_any_of_it_is_read() -> None:
    with serving() as (port, metrics), connect(port) as connection:
        connection.sendall(
            b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 104857600\r\nExpect: 100-continue\r\n\r\n"
        )
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in received.lower()
        assert b'rlhf_requests_refused_total{reason="body-too-large"} 1.0' in metrics.render()


def test_a_refused_body_is_logged_as_what_it_was_told(log: pytest.LogCaptureFixture) -> None:
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 104857600\r\n\r\n")
        connection.recv(65536)
    (line,) = facts(log)
    assert (line["status"], line["abandoned"]) == (413, False)


def test_a_refused_caller_who_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.body, "LINGER_SECONDS", 0.2)
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 104857600\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_body_that_dribbles_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.body, "LINGER_SECONDS", 0.1)
    with serving(body_timeout_seconds=0.3) as (port, _), connect(port) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        connection.settimeout(0.02)
        received = b""
        for _ in range(1000):
            try:
                connection.sendall(b"a")
                chunk = connection.recv(65536)
            except TimeoutError:
                continue
            received += chunk
            if not chunk or b"}" in chunk:
                break
        status, problem = answer_of(received)
        assert (status, problem["type"]) == (b"HTTP/1.1 408 Request Timeout", "/problems/body-too-slow")
        assert problem["detail"] == "the body was not whole after 0.3 seconds"


def test_bodies_share_a_room_that_is_given_back() -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
    with serving(max_body_bytes=1000, max_buffered_bytes=1500) as (port, _):
        with connect(port) as first, connect(port) as second:
            first.sendall(head + b"a" * 900)
            second.sendall(head + b"a" * 900)
            answering, _, _ = select.select([first, second], [], [], 20)
            refused = answering[0].recv(65536)
            assert refused.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in refused
        address = f"http://127.0.0.1:{port}/echo"
        until(lambda: httpx.post(address, content=b"a" * 1000).status_code == 200)  # once it knows that they left
        assert [httpx.post(address, content=b"a" * 1000).status_code for _ in range(5)] == [200] * 5


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_body_within_the_limit_comes_whole(size: int) -> None:
    with client(max_body_bytes=1000) as (asking, _):
        assert asking.post("/echo", content=b"a" * size).json() == {"bytes": size}
        assert asking.post("/echo", content=iter([b"a" * size])).json() == {"bytes": size}


def test_cors_is_off_unless_it_is_set() -> None:
    with client() as (asking, _):
        assert (
            "access-control-allow-origin" not in asking.get("/livez", headers={"origin": "https://a.example"}).headers
        )
    with client(cors_origins="https://a.example", max_body_bytes=10) as (asking, _):
        refused = asking.post("/echo", content=b"a" * 11, headers={"origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (413, "https://a.example")
        assert "X-Request-ID" in refused.headers["access-control-expose-headers"]
        other = asking.get("/livez", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_no_heavy_library_stands_between_a_caller_and_an_answer() -> None:
    """The shell itself needs no torch; only the models do."""
    code = "import sys, app.middleware, app.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
