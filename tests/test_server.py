"""The server as a process: its port, its stop, its guarded connections."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from app.__main__ import main
from app.server import listen
from rlhf.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.tiny_server import in_background, until


@contextmanager
def process(**given: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The tiny server as a process of its own, and its address."""
    command = [sys.executable, "-m", "tests.tiny_server", json.dumps(given)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def log_of(server: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What an ended server has logged."""
    assert server.stderr is not None
    return [json.loads(line) for line in server.stderr.read().splitlines() if line.startswith("{")]


def test_sigterm_finishes_what_was_accepted_and_refuses_what_is_new() -> None:
    with process() as (server, address):
        waiting, answers = in_background(lambda: httpx.get(f"{address}/slow", timeout=30))
        until(lambda: httpx.get(f"{address}/livez").json()["calls"] == 1)
        assert httpx.get(f"{address}/readyz").status_code == 200
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{address}/readyz").status_code == 503)
        late = httpx.get(f"{address}/slow")
        assert (late.status_code, late.headers["connection"], late.headers["retry-after"]) == (503, "close", "1")
        assert late.json()["type"] == "/problems/draining"
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGINT)
        assert httpx.get(f"{address}/livez").status_code == 200
        httpx.post(f"{address}/release")
        waiting.join()
        assert (answers[0].status_code, answers[0].json()) == (200, {"done": True})
        assert server.wait(20) == 0
        assert [line["message"] for line in log_of(server) if line["level"] == "ERROR"] == []


def test_when_the_time_is_over_it_says_what_was_lost_and_still_ends_with_0() -> None:
    with process(drain_seconds=0.2) as (server, address):
        waiting, answers = in_background(lambda: httpx.get(f"{address}/slow", timeout=30))
        until(lambda: httpx.get(f"{address}/livez").json()["calls"] == 1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        waiting.join()
        assert (answers[0].status_code, answers[0].json()["type"]) == (503, "/problems/draining")
        messages = [line["message"] for line in log_of(server)]
        assert any("APP_DRAIN_SECONDS=0.2 were not enough; requests lost: 1" in message for message in messages)


def test_a_thread_that_does_not_end_does_not_keep_the_process() -> None:
    with process(load="stuck", leaving=0.2) as (server, address):
        assert httpx.get(f"{address}/livez").status_code == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


@pytest.mark.parametrize(
    ("load", "error"), [("failing", "PrerequisiteError: there is no run"), ("broken", "RuntimeError: a bug")]
)
def test_what_stops_the_load_stops_the_process(load: str, error: str) -> None:
    with process(load=load) as (server, _):
        assert server.wait(20) == 1
        assert server.stderr is not None
        assert error in server.stderr.read().splitlines()[-1]


def test_a_port_in_use_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, restored_signals: None
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("APP_RUN_DIR", str(REPOSITORY))
        monkeypatch.setenv("APP_PORT", str(port))
        assert main([]) == 78
    expected = f"app: cannot listen on APP_HOST=127.0.0.1 APP_PORT={port}: Address already in use; "
    assert capsys.readouterr().err.startswith(expected)


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_host_that_is_not_this_machine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"APP_HOST=192\.0\.2\.1 "):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"^APP_HOST=no host is no address of this machine"):
        listen("no host", 0)


def test_it_listens_on_ipv6() -> None:
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 here")
    with listen("::1", 0) as listener:
        assert listener.family is socket.AF_INET6


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom app.__main__ import build_parser\nbuild_parser().format_help()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic', 'fastapi', 'uvicorn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["settings", "x"], 64, "unrecognized arguments: x"), (["new-key", "a b"], 64, "'a b' is no name for a key")],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
