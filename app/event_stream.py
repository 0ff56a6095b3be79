"""Server-sent events: an answer in pieces, with a sign of life while there is nothing to say.

Source: the HTML standard, section 9.2, "Server-sent events".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.disconnect import CallerGone, gone
from app.problems import INTERNAL, ProblemError, problem_document

logger = logging.getLogger(__name__)

Emit = Callable[[str, BaseModel], None]
Accept = Callable[[], None]

PING_SECONDS = 10.0
"""Proxies close connections on which nothing moves; a comment every so often keeps them."""


class EventStream(Response):
    """Runs `write`, which is given `emit` for events and `accept` for the moment from which there will be some.

    A ProblemError before that is raised, to be answered as any other; after it, it is the last event, `error`, and
    refused is told its name. When the caller goes away, `write` is cancelled, and CallerGone is raised.
    """

    media_type = "text/event-stream"

    def __init__(self, write: Callable[[Emit, Accept], Awaitable[None]], *, refused: Callable[[str], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._write = write
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        events: asyncio.Queue[bytes | ProblemError | None] = asyncio.Queue()
        writing = asyncio.ensure_future(self._run(events, scope))
        leaving = asyncio.ensure_future(gone(receive))
        leaving.add_done_callback(lambda task: events.put_nowait(None))
        try:
            first = await events.get()
            if isinstance(first, ProblemError):
                raise first
            if first is not None:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_events(events, send)
            if not writing.done():
                raise CallerGone
            await send({"type": "http.response.body", "body": b""})
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _send_events(self, events: asyncio.Queue[bytes | ProblemError | None], send: Send) -> None:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), PING_SECONDS)
            except TimeoutError:
                event = b": ping\n\n"
            if event is None:
                return
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _run(self, events: asyncio.Queue[bytes | ProblemError | None], scope: Scope) -> None:
        accepted = False

        def accept() -> None:
            nonlocal accepted
            accepted = True
            events.put_nowait(b": accepted\n\n")

        try:
            await self._write(lambda name, data: events.put_nowait(encode_event(name, data)), accept)
        except Exception as error:
            if not isinstance(error, ProblemError):
                logger.exception("a stream failed")
            problem = error if isinstance(error, ProblemError) else ProblemError(INTERNAL, "the service failed")
            if accepted:
                self._refused(problem.kind.name)
                events.put_nowait(encode_event("error", problem_document(problem, scope)))
            else:
                events.put_nowait(problem)
        events.put_nowait(None)


def encode_event(name: str, data: BaseModel) -> bytes:
    """One event; JSON holds no line break, so one data line is enough."""
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n".encode()
