"""Connections that misbehave: late or endless headers, no HTTP, no reader, too many."""

import json
import socket
import time

import httpx
import pytest

from tests.tiny_server import connect, in_background, read_all, serving, until


def test_headers_that_dribble_close_the_connection() -> None:
    with serving(header_timeout_seconds=0.3) as (port, _), connect(port) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        assert read_all(connection) == b""


def test_a_connection_that_says_nothing_is_closed() -> None:
    with serving(header_timeout_seconds=0.3) as (port, _), connect(port) as connection:
        assert read_all(connection) == b""


def test_headers_that_dribble_on_a_used_connection_close_it_too() -> None:
    """Each byte resets uvicorn's clock for idle connections; ours goes on."""
    with serving(header_timeout_seconds=0.4, keep_alive_seconds=30) as (port, _), connect(port) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < started + 20:
                connection.sendall(b"\r\n")
                time.sleep(0.05)
        assert time.monotonic() < started + 20


def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    with serving(header_timeout_seconds=0.2, keep_alive_seconds=0.2) as (port, _):
        address = f"http://127.0.0.1:{port}"
        waiting, answers = in_background(lambda: httpx.get(f"{address}/slow", timeout=30))
        until(lambda: httpx.get(f"{address}/livez").json()["calls"] == 1)
        with connect(port) as idle:
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            assert read_all(idle).startswith(b"HTTP/1.1 200")
        httpx.post(f"{address}/release")
        waiting.join()
        assert answers[0].status_code == 200


def test_headers_without_end_are_refused() -> None:
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n" + b"X-Pad: " + b"a" * 70_000)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431")
        assert json.loads(body)["type"] == "/problems/headers-too-large"


def test_headers_without_end_behind_a_request_cut_the_connection() -> None:
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/livez").json()["calls"] == 1)
        with pytest.raises(OSError):
            for _ in range(10_000):
                connection.sendall(b"GET / HTTP/1.1\r\nX-Pad: " + b"a" * 70_000)
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200)


def test_a_large_body_is_not_taken_for_headers() -> None:
    body = b"a" * 1_000_000
    with serving() as (port, _), connect(port) as connection:
        for _ in range(2):
            connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + body)
        received = b""
        while received.count(b'{"bytes":1000000}') < 2:
            received += connection.recv(65536)


def test_what_is_not_http_is_told_as_a_problem() -> None:
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        problem = json.loads(body)
        assert head.startswith(b"HTTP/1.1 400")
        assert (problem["type"], f"x-request-id: {problem['request_id']}".encode() in head.lower()) == (
            "/problems/bad-http",
            True,
        )


def test_a_body_that_is_not_http_is_told_as_a_problem_too() -> None:
    with serving() as (port, _), connect(port) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n")
        received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 400")
        assert received.count(b"HTTP/1.1 ") == 1


def test_a_caller_who_does_not_read_its_answer_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "app.connections")
    with serving(write_timeout_seconds=0.2) as (port, _), connect(port) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: "connection cut: its answer was not read for 0.2 seconds" in caplog.messages)
        assert _bytes_until_cut(connection) < 50_000_000


def _bytes_until_cut(connection: socket.socket) -> int:
    count = 0
    try:
        while received := len(connection.recv(2**20)):
            count += received
    except ConnectionResetError:
        pass
    return count


def test_a_caller_who_reads_its_answer_gets_all_of_it() -> None:
    with serving(write_timeout_seconds=5) as (port, _):
        assert len(httpx.get(f"http://127.0.0.1:{port}/large").content) == 50_000_000


def test_above_the_limit_only_probes_are_answered() -> None:
    with serving(max_connections=2) as (port, metrics), connect(port), connect(port):
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        refused = httpx.post(f"http://127.0.0.1:{port}/echo")
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert refused.json()["type"] == "/problems/overloaded"
        assert refused.headers["x-request-id"] == refused.json()["request_id"]
        with connect(port), connect(port), connect(port) as fifth:
            assert _is_cut(fifth)
        assert b'rlhf_http_requests_total{route="/livez",status="200"} 1.0' in metrics.render()
        assert b'rlhf_http_requests_total{route="other",status="503"} 1.0' in metrics.render()
    with serving(max_connections=2) as (port, _), connect(port):
        assert httpx.post(f"http://127.0.0.1:{port}/echo").status_code == 200


def _is_cut(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_the_server_does_not_tell_what_it_is() -> None:
    with serving() as (port, _):
        assert "server" not in httpx.get(f"http://127.0.0.1:{port}/livez").headers


def test_an_address_in_x_forwarded_for_counts_only_from_a_trusted_proxy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "app.access")
    for trusted in ((), ("127.0.0.1",)):
        with serving(trusted_proxies=trusted) as (port, _):
            httpx.get(f"http://127.0.0.1:{port}/livez", headers={"x-forwarded-for": "203.0.113.9"})
    clients = [record.facts["client"] for record in caplog.records if record.name == "app.access"]
    assert clients == ["127.0.0.1", "203.0.113.9"]
