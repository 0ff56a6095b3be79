"""What surrounds every request: its id, one line in the access log, its metrics, and the answer to a bug."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.disconnect import CallerGone
from app.metrics import Metrics
from app.problems import DRAINING, INTERNAL, ProblemError, problem_response

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("app.access")

ID_HEADER = "X-Request-ID"
CALLER_LEFT = 499
"""The status that proxies log for a request whose caller went away."""

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_current_id: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the request that this task works for; empty outside one."""
    return _current_id.get()


def new_request_id(given: str | None = None) -> str:
    """The id that a caller gave, where it is fit for a log, or a fresh one."""
    return given if given is not None and _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass
class Exchange:
    """One request and its answer, as far as they have got."""

    scope: Scope
    request_id: str
    started: float = field(default_factory=time.perf_counter)
    bytes_in: int = 0
    bytes_out: int = 0
    status: int | None = None
    length: int = -1
    complete: bool = False
    abandoned: bool = False

    @property
    def route(self) -> str:
        """The template of the path; `other` where no route matched, so that labels stay few."""
        return getattr(self.scope.get("route"), "path", "other")

    @property
    def path(self) -> str:
        """Without the query, and quoted, so that it cannot break a line of the log."""
        return quote(self.scope["path"])

    @property
    def outcome(self) -> int:
        """The status that was told; 500 where there was no answer at all, because it was cut off."""
        return CALLER_LEFT if self.abandoned else self.status or INTERNAL.status

    def receiving(self, receive: Receive) -> Receive:
        """Notice what comes in, and that the caller leaves."""

        async def observed() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self.bytes_in += len(message.get("body", b""))
            elif not self.complete:
                self.abandoned = True
            return message

        return observed

    def sending(self, send: Send) -> Send:
        """Notice what goes out, and give it the id."""

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = self.request_id
                self.status, self.length = message["status"], int(headers.get("content-length", -1))
            elif message["type"] == "http.response.body":
                self.bytes_out += len(message.get("body", b""))
                self.complete = not message.get("more_body", False) or self.bytes_out == self.length
            await send(message)

        return observed

    def facts(self) -> dict[str, Any]:
        """The line of the access log: no query, no body, no key."""
        client = self.scope.get("client")
        return {
            "method": self.scope["method"],
            "path": self.path,
            "status": self.outcome,
            "seconds": round(time.perf_counter() - self.started, 6),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "key": self.scope["state"].get("key_name"),
            "client": client[0] if client else None,
            "request_id": self.request_id,
            "abandoned": self.abandoned,
        }


class RequestMiddleware:
    """ASGI middleware; it stands outside the others, so that whatever they answer carries the id and is logged."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, new_request_id(Headers(scope=scope).get(ID_HEADER)))
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        token = _current_id.set(exchange.request_id)
        try:
            await self._answer(exchange, exchange.receiving(receive), exchange.sending(send))
        finally:
            self._note(exchange)
            _current_id.reset(token)

    async def _answer(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        try:
            await self._app(exchange.scope, receive, send)
        except (CallerGone, ClientDisconnect):
            exchange.abandoned = True
        except asyncio.CancelledError:
            # Only the server cancels a whole request: when its time to stop is over.
            await self._tell(ProblemError(DRAINING, "the service stopped before the answer was done"), exchange, send)
        except Exception:
            logger.exception("a request failed path=%s", exchange.path)
            detail = "the service failed; its log holds the reason under this request's id"
            await self._tell(ProblemError(INTERNAL, detail), exchange, send)

    async def _tell(self, error: ProblemError, exchange: Exchange, send: Send) -> None:
        """Answer with this problem; an answer that has begun is left unfinished, which closes the connection."""
        self._metrics.refused(error.kind.name)
        if exchange.status is None:
            response = problem_response(error, exchange.scope)
            await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
            await send({"type": "http.response.body", "body": response.body})

    def _note(self, exchange: Exchange) -> None:
        facts = exchange.facts()
        if exchange.abandoned:
            self._metrics.abandoned()
        self._metrics.answered(exchange.route, exchange.outcome, facts["seconds"])
        access_logger.info("%s %s %d", facts["method"], facts["path"], exchange.outcome, extra={"facts": facts})
