"""The service's routes: what is done for each, in the order in which it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import JSONResponse

from app.disconnect import unless_gone
from app.event_stream import Accept, Emit, EventStream
from app.metrics import CONTENT_TYPE
from app.openapi import events, problems
from app.problems import DEADLINE, ProblemError, problem_page
from app.requests import current_request_id
from app.schemas import (
    Health,
    ModelsAnswer,
    ReloadAnswer,
    ScoreAnswer,
    ScoreRequest,
    SummarizeAnswer,
    SummarizeRequest,
)
from app.scores import score
from app.service import Service
from app.summaries import SummarizeCall

EVENTS = "text/event-stream"
CALL_PROBLEMS = problems(401, 408, 413, 415, 422, 429, 500, 503, 504)


def call_router(service: Service) -> APIRouter:
    """What callers with a key may use."""
    router = APIRouter()

    @router.post(
        "/summarize",
        response_model=SummarizeAnswer,
        responses=CALL_PROBLEMS | {200: {"content": {EVENTS: {"schema": events()}}}},
    )
    async def summarize(
        request: Request,
        wanted: SummarizeRequest,
        stream: bool = Query(False, description="answer as server-sent events, as with Accept: text/event-stream"),
    ) -> Any:
        """Summarise posts, in their order.

        As server-sent events: `token` (a TokenEvent) for each piece of text as it is written, `result` (a Summary)
        for each post as it is done, then `done` (a DoneEvent), or `error` (a Problem) when it fails on the way.
        """
        if stream or EVENTS in request.headers.get("accept", ""):
            return EventStream(_streamed(service, wanted, current_request_id()), refused=service.metrics.refused)

        async def work() -> SummarizeAnswer:
            async with deadline(service, wanted.timeout_seconds):
                with service.held() as served:
                    call = await SummarizeCall.begin(wanted, served, service.settings, service.tokenizing)
                    try:
                        return await call.answer(current_request_id())
                    finally:
                        call.abandon()

        return await unless_gone(work(), request.receive)

    @router.post("/score", response_model=ScoreAnswer, responses=CALL_PROBLEMS)
    async def score_summaries(request: Request, wanted: ScoreRequest) -> Any:
        """Score summaries by the reward model; with a reference, the difference too."""

        async def work() -> ScoreAnswer:
            async with deadline(service, wanted.timeout_seconds):
                with service.held() as served:
                    return await score(
                        wanted, served, service.settings, service.tokenizing, request_id=current_request_id()
                    )

        return await unless_gone(work(), request.receive)

    @router.get("/v1/models", responses=problems(401, 429, 503))
    async def models() -> ModelsAnswer:
        """The models that are being served."""
        with service.held() as served:
            return ModelsAnswer(models=served.models)

    return router


def admin_router(service: Service) -> APIRouter:
    """What needs an admin's key."""
    router = APIRouter(prefix="/admin")

    @router.post("/reload", responses=problems(401, 403, 409, 503))
    async def reload() -> ReloadAnswer:
        """Load what the run's `final` pointers name now, and change over; on failure the old models stay."""
        return await service.reload()

    return router


def probe_router(service: Service) -> APIRouter:
    """For whatever supervises the service; no key is needed."""
    router = APIRouter()
    failing: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "not so"}}

    def health(found: Health) -> Response:
        return JSONResponse(found.model_dump(), status_code=200 if found.status == "ok" else 503)

    @router.get("/livez", response_model=Health, responses=failing)
    async def livez() -> Response:
        """Whether the process is worth keeping."""
        return health(service.live())

    @router.get("/readyz", response_model=Health, responses=failing)
    async def readyz() -> Response:
        """Whether new work is taken."""
        return health(service.ready())

    @router.get("/startupz", response_model=Health, responses=failing)
    async def startupz() -> Response:
        """Whether the models are loaded, or what is being done for that."""
        return health(service.started())

    @router.get("/problems/{name}", include_in_schema=False)
    async def explanation(name: str) -> Response:
        """What a kind of error means, and what to do about it."""
        return problem_page(name)

    @router.get("/metrics", responses={200: {"content": {CONTENT_TYPE: {}}}}, response_class=Response)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return router


@asynccontextmanager
async def deadline(service: Service, seconds: float | None) -> AsyncIterator[None]:
    """Give the work up after the caller's time, or the service's. Raises ProblemError then."""
    limit = seconds or service.settings.timeout_seconds
    try:
        async with asyncio.timeout(limit):
            yield
    except TimeoutError:
        raise ProblemError(DEADLINE, f"the request was not done within {limit:g} seconds") from None


def _streamed(service: Service, wanted: SummarizeRequest, request_id: str) -> Callable[[Emit, Accept], Awaitable[None]]:
    async def write(emit: Emit, accept: Accept) -> None:
        async with deadline(service, wanted.timeout_seconds):
            with service.held() as served:
                call = await SummarizeCall.begin(
                    wanted, served, service.settings, service.tokenizing, hear=lambda event: emit("token", event)
                )
                try:
                    accept()
                    async for summary in call.summaries():
                        emit("result", summary)
                    emit("done", call.done(request_id))
                finally:
                    call.abandon()

    return write
