"""Bodies: too large, too slow or too many at once are refused before anything is made of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import Metrics
from app.problems import BODY_TOO_LARGE, BODY_TOO_SLOW, CLOSE, QUEUE_FULL, ProblemError, problem_response

LINGER_SECONDS = 5.0
"""How long a caller who was refused may go on sending before the connection is cut."""


class Body:
    """The part of a body that has come."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size = 0

    def replay(self, receive: Receive) -> Receive:
        """Hand out the whole body at once, then whatever comes next: the caller leaving."""

        async def replayed() -> Message:
            if not self.chunks:
                return await receive()
            body = b"".join(self.chunks)
            self.chunks.clear()
            return {"type": "http.request", "body": body, "more_body": False}

        return replayed


class BodyMiddleware:
    """ASGI middleware that reads a body whole before the application is asked.

    A body is refused from its Content-Length before any of it is read, and while it comes as soon as it is over
    max_bytes. max_buffered_bytes bounds what all requests in progress hold together.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, max_buffered_bytes: int, timeout_seconds: float, metrics: Metrics
    ) -> None:
        self._app, self._metrics = app, metrics
        self._max_bytes, self._max_buffered_bytes = max_bytes, max_buffered_bytes
        self._timeout_seconds = timeout_seconds
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Raises ClientDisconnect when the caller leaves before the body is whole."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body()
        try:
            refusal = self._judge_length(scope) or await self._read(receive, body)
            if refusal is None:
                await self._app(scope, body.replay(receive), send)
        finally:
            self._buffered -= body.size
            body.chunks.clear()
        if refusal is not None:
            self._metrics.refused(refusal.kind.name)
            await refuse_and_linger(refusal, scope, receive, send)

    def _judge_length(self, scope: Scope) -> ProblemError | None:
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            return ProblemError(BODY_TOO_LARGE, f"the body has {declared} bytes; {self._max_bytes} is the most")
        return None

    async def _read(self, receive: Receive, body: Body) -> ProblemError | None:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    if refusal := self._keep(message.get("body", b""), body):
                        return refusal
                    if not message.get("more_body", False):
                        return None
        except TimeoutError:
            return ProblemError(BODY_TOO_SLOW, f"the body was not whole after {self._timeout_seconds:g} seconds")

    def _keep(self, chunk: bytes, body: Body) -> ProblemError | None:
        body.chunks.append(chunk)
        body.size += len(chunk)
        self._buffered += len(chunk)
        if body.size > self._max_bytes:
            return ProblemError(BODY_TOO_LARGE, f"the body has more than {self._max_bytes} bytes, which is the most")
        if self._buffered > self._max_buffered_bytes:
            return ProblemError(QUEUE_FULL, f"requests in progress hold {self._max_buffered_bytes} bytes of bodies")
        return None


async def refuse_and_linger(error: ProblemError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer while the caller may still be sending, and close the connection once it has had time to read that.

    Closed at once, with bytes of the caller unread, the connection would be reset and the answer be lost. So the
    whole answer goes out, what still comes is thrown away, and only then does the answer end.
    """
    response = problem_response(error, scope, headers=dict(CLOSE))
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})
