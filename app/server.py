"""uvicorn as this service runs it: guarded connections, and a stop that loses nothing."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from app.connections import ServerConfig
from app.metrics import Metrics
from app.settings import Settings
from rlhf.errors import ConfigError

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048
"""Connections that may wait to be taken."""

LEAVING_SECONDS = 5.0
"""Time for threads to end once the last connection is closed."""


class Drainable(Protocol):
    """What the server asks of the service; all of it from the event loop."""

    @property
    def metrics(self) -> Metrics:
        """Where refused connections are counted."""
        ...

    async def load(self) -> None:
        """Get ready to serve. Raises RlhfError when that cannot be done."""
        ...

    def begin_drain(self) -> None:
        """Take no new work from now on; what was accepted goes on."""
        ...

    async def drained(self) -> None:
        """Wait until all that was accepted is done."""
        ...

    async def close(self) -> None:
        """End all threads, and send what is still to be told."""
        ...


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before anything heavy is loaded. Raises ConfigError when that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"APP_HOST={host} is no address of this machine: {error.strerror}") from error
    except OSError as error:
        reason, remedy = os.strerror(error.errno or 0), "stop what uses the port, or set APP_PORT to another"
        raise ConfigError(f"cannot listen on APP_HOST={host} APP_PORT={port}: {reason}; {remedy}") from error
    # asyncio's own loop leaves it off, and small answers then wait for the caller's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run(app: ASGIApp, service: Drainable, settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted. Probes are answered while the service loads.

    Raises what loading raised, once the server has stopped.
    """
    server = Server(app, service, settings)
    logger.info("listening on http://%s:%d", settings.host, listener.getsockname()[1])
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """Drains on a signal instead of closing the door: callers are answered until the last one is done."""

    def __init__(self, app: ASGIApp, service: Drainable, settings: Settings) -> None:
        super().__init__(ServerConfig(app, settings, service.metrics))
        self.failure: BaseException | None = None
        self._service, self._drain_seconds = service, settings.drain_seconds
        self._stopping: asyncio.Task[None] | None = None
        self._owns_process = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the service load while the probes are answered; stop when it cannot."""
        loading = asyncio.create_task(self._service.load())
        loading.add_done_callback(self._loaded)
        try:
            await super().serve(sockets)
        finally:
            loading.cancel()
            self._leave_after(LEAVING_SECONDS)
            await self._service.close()

    def _loaded(self, loading: asyncio.Task[None]) -> None:
        if self._stopping is None and not loading.cancelled() and (error := loading.exception()):
            self.failure = error
            self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal; a second one changes nothing, also while the process ends."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._owns_process = True
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop, signal.Signals(number).name)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)

    def stop(self, reason: str) -> None:
        """Begin to stop; for the event loop."""
        if self._stopping is None:
            logger.info("%s: finishing what was accepted, for %g seconds at most", reason, self._drain_seconds)
            self._service.begin_drain()
            self._stopping = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        ends = time.monotonic() + self._drain_seconds
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._service.drained()
        except TimeoutError:
            lost = len(self.server_state.tasks)
            logger.error("APP_DRAIN_SECONDS=%g were not enough; requests lost: %d", self._drain_seconds, lost)
        finally:
            seconds_left = max(1, math.ceil(ends - time.monotonic()))
            self.config.timeout_graceful_shutdown = seconds_left
            self._leave_after(seconds_left + LEAVING_SECONDS)
            self.should_exit = True

    def _leave_after(self, seconds: float) -> None:
        """End the process then, whatever still runs: a thread that loads or takes a step cannot be stopped."""
        if self._stopping is not None and self._owns_process:
            timer = threading.Timer(seconds, _leave)
            timer.daemon = True
            timer.start()


def _leave() -> None:
    logger.warning("a thread did not end; leaving without it")
    os._exit(0)
