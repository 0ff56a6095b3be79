"""A service without models, behind the real shell: real uvicorn, real sockets, in a thread or as a program."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

import app.server
from app.error_handlers import add_error_handlers
from app.logs import RequestJsonFormatter
from app.metrics import Metrics
from app.middleware import add_middleware
from app.problems import DRAINING, ProblemError
from app.server import Server, listen, run
from app.settings import Settings
from app.tracing import start_tracing
from rlhf.errors import PrerequisiteError


class TinyService:
    """Calls that last until they are released."""

    def __init__(self, load: str = "quick") -> None:
        self.metrics = Metrics()
        self.draining = False
        self.calls = 0
        self._load = load
        self._idle = asyncio.Event()
        self._released = asyncio.Event()

    async def load(self) -> None:
        if self._load == "failing":
            raise PrerequisiteError("there is no run; run `make demo` first")
        if self._load == "broken":
            raise RuntimeError("a bug")
        if self._load == "stuck":
            await asyncio.to_thread(threading.Event().wait)

    def begin_drain(self) -> None:
        self.draining = True

    async def drained(self) -> None:
        while self.calls:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """There is nothing to end."""

    async def call(self) -> None:
        if self.draining:
            raise ProblemError(DRAINING, "no new work")
        self.calls += 1
        try:
            await self._released.wait()
        finally:
            self.calls -= 1
            self._idle.set()

    def release(self) -> None:
        self._released.set()


def tiny_app(service: TinyService, settings: Settings) -> FastAPI:
    """Routes that do what a test needs."""
    app = FastAPI()
    add_error_handlers(app, service.metrics)
    add_middleware(app, settings, service.metrics, start_tracing(settings.otlp_endpoint))

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/slow")
    async def slow() -> dict[str, bool]:
        await service.call()
        return {"done": True}

    @app.post("/release")
    async def release() -> None:
        service.release()

    @app.get("/large")
    async def large() -> Response:
        return Response(b"a" * 50_000_000)

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("a secret of the service")

    @app.get("/livez")
    async def livez() -> dict[str, int]:
        return {"calls": service.calls}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse({}, status_code=503 if service.draining else 200)

    return app


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[int, Metrics]]:
    """The shell in a thread, on a free port; gives the port and the metrics."""
    service = TinyService()
    chosen = Settings(run_dir=Path("."), port=0, **settings)
    listener = listen(chosen.host, chosen.port)
    server = Server(tiny_app(service, chosen), service, chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1], service.metrics
    finally:
        server.config.timeout_graceful_shutdown = 1
        server.should_exit = True
        thread.join()
        listener.close()


def connect(port: int) -> socket.socket:
    """A connection that no test waits on for ever."""
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another process."""
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def in_background(ask: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []

    def run() -> None:
        answers.append(ask())

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def main() -> int:
    """The shell as a program: `python -m tests.tiny_server '{"load": …, "leaving": …, settings…}'`."""
    given = json.loads(sys.argv[1])
    handler = logging.StreamHandler()
    handler.setFormatter(RequestJsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    app.server.LEAVING_SECONDS = given.pop("leaving", 5.0)
    service = TinyService(given.pop("load", "quick"))
    settings = Settings(run_dir=Path("."), port=0, **given)
    with listen(settings.host, settings.port) as listener:
        print(listener.getsockname()[1], flush=True)
        run(tiny_app(service, settings), service, settings, listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
