"""Connections: uvicorn's HTTP protocol with limits on what a caller may do before its request is whole."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.body import refuse_and_linger
from app.metrics import Metrics
from app.problems import BAD_HTTP, HEADERS_TOO_LARGE, OVERLOADED, Kind, ProblemError, problem_response
from app.requests import ID_HEADER, RequestMiddleware, new_request_id
from app.settings import Settings

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
PROBES = frozenset({"/livez", "/readyz", "/startupz"})


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration with the limits that GuardedProtocol keeps, from the service's settings."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        super().__init__(
            app,
            http=GuardedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
        )
        self.header_timeout_seconds = settings.header_timeout_seconds
        self.write_timeout_seconds = settings.write_timeout_seconds
        self.max_connections = settings.max_connections
        self.overloaded_app = _only_probes(app, RequestMiddleware(_refuse, metrics))


def _only_probes(app: ASGIApp, refuse: ASGIApp) -> ASGIApp:
    """What a connection above the limit gets: a busy service must not look like a dead one."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["path"] in PROBES else refuse)(scope, receive, send)

    return answer


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = ProblemError(OVERLOADED, "too many connections are open; close some or wait")
    await refuse_and_linger(error, scope, receive, send)


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Closed when a request's headers take too long, from the moment when the connection stands or the request before is
    answered, and when the caller does not read its answer. Headers have a largest size. Above max_connections only
    probes are answered, above twice as many nothing is.
    """

    config: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_headers, self._header_bytes, self._message_ended = True, 0, False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        count, most = len(self.connections), self.config.max_connections
        if count > 2 * most:
            logger.warning("connection refused: %d are open", count - 1)
            transport.abort()
            return
        if count > most:
            self.app = self.config.overloaded_app
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; the clock runs while this may be part of a request's headers."""
        if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()
        self._message_ended = False
        super().data_received(data)
        if not self._in_headers or self._message_ended:
            self._header_bytes = 0
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_unread(HEADERS_TOO_LARGE, f"the headers have more than {MAX_HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """Stop the clock, and let the request begin."""
        self._in_headers = False
        self._stop_clocks()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes now are the headers of another request."""
        self._in_headers = self._message_ended = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The caller reads more slowly than it is answered; begin to wait for it."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.config.write_timeout_seconds, self._reader_late)

    def resume_writing(self) -> None:
        """The caller reads again."""
        self._stop_clocks()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clocks."""
        self._stop_clocks()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell that this is not HTTP, as a problem document too."""
        self._refuse_unread(BAD_HTTP, msg)

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.config.header_timeout_seconds, self._headers_late)

    def _stop_clocks(self) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._write_timer = None

    def _headers_late(self) -> None:
        logger.info("connection closed: no whole headers within %g seconds", self.config.header_timeout_seconds)
        self.transport.close()

    def _reader_late(self) -> None:
        logger.info("connection cut: its answer was not read for %g seconds", self.config.write_timeout_seconds)
        self.transport.abort()

    def _refuse_unread(self, kind: Kind, detail: str) -> None:
        """Answer what could not be read as a request, and close."""
        self._stop_clocks()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # the answer to the request before is on its way; nothing may be put into it
            return
        request_id = new_request_id()
        scope = {"type": "http", "path": "/", "state": {"request_id": request_id}}
        response = problem_response(ProblemError(kind, detail), scope, headers={ID_HEADER: request_id})
        lines = [b"%s: %s\r\n" % header for header in [*self.server_state.default_headers, *response.raw_headers]]
        logger.info("refused before a request was whole: %s request_id=%s", kind.name, request_id)
        self.transport.write(STATUS_LINE[kind.status] + b"".join(lines) + b"\r\n" + bytes(response.body))
        self.transport.close()
