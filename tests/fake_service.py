"""A stand-in for the service behind the page: the same wire contract, canned answers, failures at a switch."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.page import page_router
from app.schemas import (
    Candidate,
    DoneEvent,
    FieldProblem,
    Health,
    ModelInfo,
    ModelsAnswer,
    Problem,
    Score,
    ScoreAnswer,
    ScoreItem,
    ScoreRequest,
    SummarizeAnswer,
    SummarizeRequest,
    Summary,
    TokenEvent,
)

TEXTS = {
    "sft": "so this is a long story but over a bike, that saturday, anyway any advice would really help me out.",
    "ppo": "trouble with my neighbor, over a bike, that saturday, out 90 dollars, now guilty, should i forgive.",
}
SCORES = {"sft": -0.384, "ppo": 1.326}
DRAWN_SEED = 4242
SERVED = {"ppo": 16, "sft": 1500, "reward": 375}


@dataclass
class Failure:
    """How the next request fails."""

    status: int
    title: str
    detail: str = "as the test asked"
    errors: list[FieldProblem] | None = None
    retry_after: int | None = None
    model: str | None = None


@dataclass
class FakeService:
    """What the service answers; a test changes it while the page is open."""

    served: tuple[str, ...] = ("ppo", "sft")
    texts: dict[str, str] = field(default_factory=lambda: dict(TEXTS))
    phase: str | None = None
    """What it is loading; ready when None."""
    api_key: str | None = None
    failures: list[Failure] = field(default_factory=list)
    cut_tokens: int = 0
    break_after: int | None = None
    """Tokens after which a stream ends with an `error` event."""
    held: threading.Event = field(default_factory=threading.Event)
    """While set, streams stop after three tokens."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when a caller leaves in the middle of a stream."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    """Statuses of the failures so far: browsers tell each one on their console."""

    def failure(self, request: Request, model: str | None) -> Response | None:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return self.refuse(Failure(401, "A valid API key is needed", "This service wants a key."), request)
        for failure in self.failures:
            if failure.model in (None, model):
                self.failures.remove(failure)
                return self.refuse(failure, request)
        return None

    def refuse(self, failure: Failure, request: Request) -> Response:
        self.refused.add(failure.status)
        return problem(failure, request)

    def summary(self, body: SummarizeRequest) -> Summary:
        text, score = self.texts[body.model], SCORES[body.model]
        candidates = [candidate(text if i == 1 else f"{text} {i}", score - abs(i - 1)) for i in range(body.best_of)]
        candidates.sort(key=lambda one: -cast(float, one.score))
        best = candidates[0] if body.best_of > 1 else candidate(text, score)
        return Summary(
            **best.model_dump(),
            index=0,
            prompt_tokens=76,
            cut_tokens=self.cut_tokens,
            candidates=candidates if body.return_candidates else None,
        )


def candidate(text: str, score: float) -> Candidate:
    finish = "stop" if score > -1 else "length"
    return Candidate.model_validate(
        {"summary": text, "score": score, "finish_reason": finish, "completion_tokens": len(text.split())}
    )


def problem(failure: Failure, request: Request) -> Response:
    document = Problem(
        type="/problems/test",
        title=failure.title,
        status=failure.status,
        detail=failure.detail,
        instance=request.url.path,
        request_id="req-7f3a",
        errors=failure.errors,
    )
    headers = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
    content = document.model_dump_json(exclude_none=True)
    return Response(content, failure.status, headers, media_type="application/problem+json")


def create_fake_app(fake: FakeService) -> FastAPI:
    app = FastAPI(title="A stand-in", version="1", docs_url=None, redoc_url=None)
    app.include_router(page_router())

    @app.get("/readyz", response_model=Health, summary="May requests be sent?", tags=["health"])
    @app.get("/startupz", response_model=Health, summary="What is being loaded?", tags=["health"])
    async def probe(response: Response) -> Health:
        """200 when it is ready, 503 with the phase of loading before that."""
        if fake.phase:
            response.status_code = 503
            fake.refused.add(503)
        return Health(status="starting" if fake.phase else "ok", phase=fake.phase or "serving")

    @app.get("/v1/models", response_model=ModelsAnswer, summary="What is being served", tags=["models"])
    async def models(request: Request) -> Response | ModelsAnswer:
        return fake.failure(request, None) or ModelsAnswer(models=[model(name) for name in (*fake.served, "reward")])

    @app.post("/summarize", response_model=SummarizeAnswer, summary="Summarise posts", tags=["models"])
    async def summarize(body: SummarizeRequest, request: Request) -> Response | SummarizeAnswer:
        """Answers in the order of `posts`; as server-sent events when asked for."""
        fake.requests.append(body.model_dump(exclude_unset=True))
        if failed := fake.failure(request, body.model):
            return failed
        if "text/event-stream" in request.headers.get("Accept", ""):
            return StreamingResponse(stream(fake, body, request), media_type="text/event-stream")
        seed = DRAWN_SEED if body.seed is None else body.seed
        about = {"id": "req-1", "model": body.model, "run": "demo", "step": SERVED[body.model], "seed": seed}
        return SummarizeAnswer.model_validate(about | {"results": [fake.summary(body)]})

    @app.post("/score", response_model=ScoreAnswer, summary="Score summaries", tags=["models"])
    async def score(body: ScoreRequest, request: Request) -> Response | ScoreAnswer:
        """The reward model's scores; `delta` where a reference is given."""
        fake.requests.append(body.model_dump(exclude_unset=True))
        [item] = body.items
        assert isinstance(item, ScoreItem)
        reference = None if item.reference is None else SCORES["ppo"]
        own = len(item.summary) / 100
        delta = None if reference is None else own - reference
        numbers = {"index": 0, "prompt_tokens": 76, "summary_tokens": 9, "cut_tokens": fake.cut_tokens}
        result = Score(score=own, reference_score=reference, delta=delta, **numbers)
        return fake.failure(request, None) or ScoreAnswer(
            id="req-2", run="demo", step=375, checksum="0" * 64, results=[result]
        )

    return app


def model(name: str) -> ModelInfo:
    about = {"id": name, "run": "demo", "stage": name, "step": SERVED[name], "prompt_version": "tldr-1"}
    size = {"parameters": 781_000, "dtype": "float32", "device": "cpu", "checksum": "0" * 64, "max_prompt_tokens": 128}
    writes = (
        {"engine": None, "max_new_tokens": None} if name == "reward" else {"engine": "builtin", "max_new_tokens": 48}
    )
    return ModelInfo.model_validate(about | size | writes)


async def stream(fake: FakeService, body: SummarizeRequest, request: Request) -> AsyncIterator[bytes]:
    try:
        yield b": ping\r\n\r\n"
        words = fake.texts[body.model].split(" ")
        for number, word in enumerate(words):
            while number == 3 and fake.held.is_set():
                await asyncio.sleep(0.01)
            if number == fake.break_after:
                broken = problem(Failure(504, "The request took too long"), request)
                yield event("error", json.loads(bytes(broken.body)))
                return
            for index in range(body.best_of):
                whole = event("token", TokenEvent(index=0, candidate=index, text=word + " "))
                middle = len(whole) // 2
                yield whole[:middle]  # pieces need not end where events or characters do
                yield whole[middle:]
        yield event("result", fake.summary(body))
        seed = DRAWN_SEED if body.seed is None else body.seed
        yield event("done", DoneEvent(id="req-1", model=body.model, run="demo", step=SERVED[body.model], seed=seed))
    except asyncio.CancelledError:
        fake.abandoned.set()
        raise


def event(name: str, data: BaseModel | dict[str, Any]) -> bytes:
    text = data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data)
    return f"event: {name}\r\ndata: {text}\r\n\r\n".encode()


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Run the application in a thread on a free port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
