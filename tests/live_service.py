"""The service as it is deployed: `python -m app` as a process of its own on a free port, and ways to ask it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import REPOSITORY

PATIENCE_SECONDS = 60.0
"""Longest that any test waits for something; a machine under load takes 15 seconds to start a service."""


@dataclass
class LiveService:
    """A running service. `client` opens as many connections as there are threads that use it."""

    process: subprocess.Popen[bytes]
    log_file: Path
    port: int
    client: httpx.Client

    @property
    def memory_bytes(self) -> int:
        """What the process holds of the machine's memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def log(self) -> list[dict[str, Any]]:
        """All that it has logged, oldest first."""
        return read_log(self.log_file)

    def complaints(self) -> list[str]:
        """What it has logged as a warning or worse."""
        return [line["message"] for line in self.log() if line["level"] not in ("DEBUG", "INFO")]

    def metric(self, name: str, **labels: str) -> float:
        """The sum over a metric's samples that have these labels; 0 where there is none."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def in_progress(self) -> tuple[float, float]:
        """Work that runs and work that waits, over all models."""
        return self.metric("rlhf_num_requests_running"), self.metric("rlhf_num_requests_waiting")

    def report(self) -> dict[str, Any]:
        """What lives in the process now, as tests.hooked_app tells it."""

        def reports() -> list[dict[str, Any]]:
            return [line for line in self.log() if line["message"] == "report"]

        count = len(reports())
        self.process.send_signal(signal.SIGUSR1)
        until(lambda: len(reports()) > count)
        return reports()[-1]

    def connect(self) -> socket.socket:
        """A connection on which nothing has been said yet."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)

    def stop(self) -> int:
        """Ask it to end by SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def live_service(
    run_dir: Path, log_file: Path, *, hooks: Path | None = None, ready: bool = True, **settings: Any
) -> Iterator[LiveService]:
    """Serve a run until the block ends; then the process is killed if it still runs.

    settings are those of app.settings. hooks: a folder by which tests.hooked_app is told what to do; without it the
    service is `python -m app`, as deployed. ready: wait until it takes work. What it logged is told with a failure.
    """
    command = [sys.executable, "-m", "app"] if hooks is None else [sys.executable, "-m", "tests.hooked_app", str(hooks)]
    environment = service_environment({"run_dir": run_dir, "port": 0, "threads": 1, **settings})
    with (
        log_file.open("wb") as stderr,
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=stderr) as process,
    ):
        try:
            port = _port(process, log_file)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS, limits=limits, trust_env=False
            ) as client:
                if ready:
                    until(lambda: process.poll() is not None or client.get("/readyz").status_code == 200)
                    assert process.poll() is None, "it ended before it was ready"
                yield LiveService(process, log_file, port, client)
        except BaseException as error:
            lines = log_file.read_text(encoding="utf-8").splitlines()
            told = [line for line in lines if '"status": 200' not in line]
            error.add_note("\n".join(["the end of the service's log:", *told[-20:]]))
            raise
        finally:
            process.kill()


def service_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """This process's environment with these APP_* variables and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("APP_")}
    return inherited | {f"APP_{name.upper()}": str(value) for name, value in settings.items()}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that is still being written and the last words of a process that failed."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another process."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.03)


def request_bytes(path: str, body: bytes, **headers: str) -> bytes:
    """A POST of JSON as it goes over the wire; `Content_Length=` and such replace the headers that it would have."""
    lines = {"Host": "test", "Content-Type": "application/json"}
    if "Transfer_Encoding" not in headers:
        lines["Content-Length"] = str(len(body))
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """What comes until it holds the mark, or until the service closes the connection."""
    received = b""
    while mark not in received:
        chunk = connection.recv(65536)
        if not chunk:
            break
        received += chunk
    return received


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers (by lower-case name) and JSON body of one answer; the connection may stay open."""
    head, _, body = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        chunk = connection.recv(65536)
        assert chunk, "the answer broke off"
        body += chunk
    return int(status.split()[1]), headers, json.loads(body)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events by name, without comments; one that is not whole is an error."""
    events = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def summarize(service: LiveService, body: str) -> httpx.Response:
    return service.client.post("/summarize", json={"posts": [body]})


def streamed(service: LiveService, body: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a summary; httpx raises when the stream breaks off."""
    answer = service.client.post("/summarize?stream=true", json={"posts": [body]})
    assert answer.status_code == 200
    return events_of(answer.text)


def summary_in(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["results"][0]["summary"])


def problem_in(answer: httpx.Response) -> tuple[int, str]:
    """Status and kind of a problem document, which must be one."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, answer.json()["type"]


def _port(process: subprocess.Popen[bytes], log_file: Path) -> int:
    """The port that the service took, from its log."""

    def found() -> list[str]:
        messages = (line["message"] for line in read_log(log_file))
        return [message for message in messages if message.startswith("listening on ")]

    until(lambda: process.poll() is not None or bool(found()))
    assert found(), f"it ended with {process.returncode} before it listened"
    return int(found()[0].rpartition(":")[2])
