"""Nodes find one another whatever the order in which they come."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from rlhf.errors import UnavailableError
from rlhf.launcher import rendezvous
from rlhf.launcher.peers import Peers
from rlhf.launcher.rendezvous import Meeting, free_port, meet

ABOUT = {"stage": "sft", "processes": 8}
Met = tuple[Meeting, Peers]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., Future[Met]]]:
    """Starts nodes in threads; what each comes to is a future."""
    port, pool = free_port(), ThreadPoolExecutor()
    nodes: list[Future[Met]] = []

    def node(rank: int, count: int, *, host: str = "localhost", timeout: int = 30, **about: Any) -> Future[Met]:
        told = ABOUT | about
        nodes.append(pool.submit(meet, host, port, node=rank, nodes=count, about=told, timeout=timeout))
        return nodes[-1]

    node.port = port  # type: ignore[attr-defined]
    yield node
    pool.shutdown()
    for one in nodes:
        if one.exception() is None:
            one.result()[1].close()


def test_all_are_told_the_same_whatever_their_order(start: Callable[..., Future[Met]]) -> None:
    others = [start(1, 3), start(2, 3)]
    meetings, peers = zip(*(one.result(30) for one in [start(0, 3), *others]), strict=True)
    assert meetings[0] == meetings[1] == meetings[2]
    assert meetings[0].address in ("127.0.0.1", "::1")
    assert [sorted(one.links) for one in peers] == [[1, 2], [0], [0]]


def test_a_name_that_does_not_resolve_yet_is_tried_again(
    start: Callable[..., Future[Met]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rlhf")
    real, tries = socket.getaddrinfo, []

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        if host != "rlhf-sft-0.rlhf-sft":
            return real(host, *rest, **options)
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real("localhost", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    joining, waiting = start(1, 2, host="rlhf-sft-0.rlhf-sft"), start(0, 2)
    assert joining.result(30)[0] == waiting.result(30)[0]
    assert len(tries) >= 3
    assert f"waiting for node 0 at rlhf-sft-0.rlhf-sft:{start.port}: Name or service not known" in caplog.messages


def test_a_deadline_names_who_did_not_come(start: Callable[..., Future[Met]]) -> None:
    with pytest.raises(
        UnavailableError, match=r"node 0 at localhost:.* did not answer within 0 s .*Connection refused"
    ):
        start(1, 2, timeout=0).result(30)
    with pytest.raises(UnavailableError, match="nodes 1, 2 of 3 did not come within 0 s; see whether their pods run"):
        start(0, 3, timeout=0).result(30)


def test_a_port_that_is_taken_is_named(start: Callable[..., Future[Met]]) -> None:
    with (
        socket.create_server(("", start.port)),
        pytest.raises(UnavailableError, match=f"node 0 cannot listen at port {start.port}: Address already in use"),
    ):
        start(0, 2).result(30)


def test_a_node_that_starts_anew_takes_its_seat_again(start: Callable[..., Future[Met]]) -> None:
    waiting = start(0, 3)
    greeting = json.dumps({"node": 1, "about": ABOUT}).encode() + b"\n"
    stale = connected(start.port)
    stale.sendall(greeting)
    again = start(1, 3)
    assert hung_up(stale)  # the new one has its seat
    last = start(2, 3)
    assert again.result(30)[0] == last.result(30)[0] == waiting.result(30)[0]


def test_a_node_that_leaves_while_waiting_is_missed(start: Callable[..., Future[Met]]) -> None:
    waiting = start(0, 2, timeout=1)
    gone = connected(start.port)
    gone.sendall(json.dumps({"node": 1, "about": ABOUT}).encode()[:20])
    gone.close()
    with pytest.raises(UnavailableError, match="node 1 of 2 did not come"):
        waiting.result(30)


def test_strangers_at_the_port_are_shown_out(start: Callable[..., Future[Met]]) -> None:
    waiting = start(0, 2)
    strangers = [connected(start.port) for _ in range(3)]
    for stranger, words in zip(strangers[:2], (b"GET / HTTP/1.1\r\n\r\n", b'{"node": "x"}\n'), strict=True):
        stranger.sendall(words)
        assert hung_up(stranger)
    joining = start(1, 2)  # the third stranger says nothing, and holds nobody up
    assert joining.result(30)[0] == waiting.result(30)[0]
    assert hung_up(strangers[2])


def test_nodes_have_to_agree_in_what_they_run(start: Callable[..., Future[Met]]) -> None:
    waiting, joining = start(0, 2), start(1, 2, processes=4)
    for node in (waiting, joining):
        with pytest.raises(UnavailableError, match="node 1 has processes 4 where node 0 has 8; start all nodes with"):
            node.result(30)


def connected(port: int) -> socket.socket:
    """A connection to node 0, as soon as it listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)


def hung_up(connection: socket.socket) -> bool:
    """Whether the other side ends the connection, without a word."""
    with connection:
        connection.settimeout(30)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True
