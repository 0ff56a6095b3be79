"""What callers may do to the service, by mistake or by malice: none of it harms the others."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from app.keys import new_key
from tests.live_service import (
    LiveService,
    live_service,
    problem_in,
    read_answer,
    read_until,
    request_bytes,
    summarize,
    until,
)
from tests.served_run import served_run

PER_MINUTE = 200
MEBIBYTE = 2**20
MANY_POSTS = 200
KEYS = {name: new_key(name) for name in ("caller", "hurried", "admin")}


def header(name: str) -> dict[str, str]:
    return {"X-API-Key": KEYS[name][0]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """One process for all of them; whatever they did, in the end nothing is left of it and it stops as it should."""
    folder = tmp_path_factory.mktemp("callers")
    (folder / "keys").write_text(f"{KEYS['caller'][1]}\n{KEYS['hurried'][1]}\n")
    (folder / "admins").write_text(f"{KEYS['admin'][1]}\n")
    settings: dict[str, Any] = {
        "api_keys_file": folder / "keys",
        "admin_keys_file": folder / "admins",
        "rate_limit_per_minute": PER_MINUTE,
        "header_timeout_seconds": 1,
        "body_timeout_seconds": 1,
        "slots": 4,
        "max_best_of": 4,
    }
    with live_service(served_run(folder), folder / "log", **settings) as running:
        running.client.headers.update(header("caller"))
        yield running
        until(lambda: running.in_progress() == (0, 0))
        assert running.client.get("/livez").status_code == 200
        assert running.stop() == 0
        assert running.complaints() == []


def posts(count: int, **options: object) -> bytes:
    return json.dumps({"posts": [f"I lost cat number {number}" for number in range(count)], **options}).encode()


def send(service: LiveService, body: bytes, **headers: str) -> httpx.Response:
    return service.client.post("/summarize", content=body, headers={"Content-Type": "application/json", **headers})


def test_a_key_is_needed_and_is_taken_from_either_header(service: LiveService) -> None:
    key = KEYS["caller"][0]
    with httpx.Client(base_url=service.client.base_url, trust_env=False) as stranger:
        for headers in ({}, {"X-API-Key": "rlhf_wrong"}, {"Authorization": "Basic abc"}, header("admin")):
            refused = stranger.get("/v1/models", headers=headers)
            assert problem_in(refused) == (401, "/problems/unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
            assert stranger.get("/v1/models", headers=headers).status_code == 200
        assert problem_in(stranger.post("/admin/reload", headers=header("caller"))) == (401, "/problems/unauthorized")
        unchanged = stranger.post("/admin/reload", headers=header("admin"))
        assert (unchanged.status_code, unchanged.json()["changed"]) == (200, False)
        assert stranger.get("/metrics").status_code == 200


def test_a_key_in_a_hurry_is_slowed_down_and_the_others_are_not(service: LiveService) -> None:
    statuses = []
    while 429 not in statuses:
        answer = service.client.get("/v1/models", headers=header("hurried"))
        statuses.append(answer.status_code)
        assert len(statuses) < 10 * PER_MINUTE
    assert statuses[:-1].count(200) == len(statuses) - 1 >= PER_MINUTE
    assert problem_in(answer) == (429, "/problems/too-many-requests")
    assert answer.headers["retry-after"] == "1"
    assert service.client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"posts": ["I lost my \xff cat"]}', 422, None),
        (b'{"posts": ["I lost my cat"', 422, "body"),
        (b'{"posts": ["I lost my \\ud800 cat"]}', 422, "posts.0"),
        (b'{"posts":' + b"[" * 100_000, 422, None),
        (b"", 422, "body"),
        (b'{"posts": ["a cat"], "temprature": 1}', 422, "temprature"),
        (b'{"posts": ["a cat"], "temperature": NaN}', 422, "temperature"),
        (posts(10_000), 422, "posts"),
        (json.dumps({"posts": [{}] * 10_000}).encode(), 422, "posts.0.body"),
        (posts(1, max_new_tokens=1000), 422, "max_new_tokens"),
        (json.dumps({"posts": ["I lost my cat " * 50]}).encode(), 422, "posts.0"),
    ],
)
def test_what_is_malformed_is_told_by_field(service: LiveService, body: bytes, status: int, field: str | None) -> None:
    answer = send(service, body)
    assert problem_in(answer) == (status, "/problems/invalid-request")
    if field is not None:
        assert answer.json()["errors"][0]["field"] == field
        assert len(answer.json()["errors"]) <= 100


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_what_is_not_json_is_refused(service: LiveService, kind: str) -> None:
    refused = send(service, posts(1), **{"Content-Type": kind})
    assert problem_in(refused) == (415, "/problems/unsupported-media-type")


def test_a_call_that_takes_too_long_is_given_up(service: LiveService) -> None:
    late = send(service, posts(MANY_POSTS, timeout_seconds=0.2))
    assert problem_in(late) == (504, "/problems/deadline")
    until(lambda: service.in_progress() == (0, 0))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_refused_and_not_kept(service: LiveService, chunked: bool) -> None:
    """The caller goes on sending whatever it is told, until it is cut off."""
    before = most = service.memory_bytes
    piece = b"a" * MEBIBYTE
    if chunked:
        headers = {"Transfer_Encoding": "chunked"}
        piece = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    else:
        headers = {"Content_Length": str(100 * MEBIBYTE)}
    with service.connect() as connection:
        connection.sendall(raw("/summarize", b"", **headers))
        for _ in range(5):
            connection.sendall(piece)
        status, answered, problem = read_answer(connection)
        with suppress(ConnectionError):
            for _ in range(95):
                connection.sendall(piece)
                most = max(most, service.memory_bytes)
    assert (status, problem["type"], answered["connection"]) == (413, "/problems/body-too-large", "close")
    assert most - before < 40 * MEBIBYTE


def test_a_body_that_is_announced_as_too_large_is_refused_unread(service: LiveService) -> None:
    with service.connect() as connection:
        connection.sendall(raw("/summarize", b"", Content_Length=str(100 * MEBIBYTE)))
        assert read_answer(connection)[0] == 413


def test_headers_that_do_not_come_hold_up_nobody(service: LiveService) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(20)]
        for connection in slow:
            connection.sendall(b"POST /summarize HTTP/1.1\r\nHost: test\r\nX-Slow: ")
        assert summarize(service, "I lost my cat").status_code == 200
        assert [connection.recv(1) for connection in slow] == [b""] * 20


def test_a_body_that_does_not_come_is_given_up(service: LiveService) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(20)]
        for connection in slow:
            connection.sendall(raw("/summarize", posts(1)[:-5], Content_Length=str(len(posts(1)))))
        assert summarize(service, "I lost my cat").status_code == 200
        for connection in slow:
            status, headers, problem = read_answer(connection)
            assert (status, problem["type"]) == (408, "/problems/body-too-slow")
            assert headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/summarize", "/summarize?stream=true"])
@pytest.mark.parametrize("polite", [True, False])
def test_a_caller_who_leaves_frees_its_places(service: LiveService, path: str, polite: bool) -> None:
    """It hangs up by closing the connection, or by a reset."""
    finished = service.metric("rlhf_request_success_total")
    abandoned = service.metric("rlhf_requests_abandoned_total")
    with service.connect() as connection:
        connection.sendall(raw(path, posts(MANY_POSTS)))
        if "stream" in path:
            assert b"event: token" in read_until(connection, b"event: token")
        until(lambda: min(service.in_progress()) > 0)
        if not polite:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: service.metric("rlhf_requests_abandoned_total") == abandoned + 1)
    until(lambda: service.in_progress() == (0, 0))
    assert service.metric("rlhf_request_success_total") - finished < MANY_POSTS
    assert service.client.get("/livez").status_code == 200


def test_a_caller_who_leaves_within_the_body_is_forgotten(service: LiveService) -> None:
    abandoned = service.metric("rlhf_requests_abandoned_total")
    with service.connect() as connection:
        connection.sendall(raw("/summarize", b"", Content_Length="100"))
    until(lambda: service.metric("rlhf_requests_abandoned_total") == abandoned + 1)


def raw(path: str, body: bytes, **headers: str) -> bytes:
    return request_bytes(path, body, **({"X_API_Key": KEYS["caller"][0]} | headers))
