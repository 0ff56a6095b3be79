"""The layers around the routes, from the outside in."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from app.body import BodyMiddleware
from app.metrics import Metrics
from app.requests import ID_HEADER, RequestMiddleware
from app.settings import Settings
from app.tracing import Tracer


def add_middleware(app: FastAPI, settings: Settings, metrics: Metrics, tracer: Tracer) -> None:
    """Traces, then request ids, the access log and bugs, then CORS where it is set, then bodies, then the routes.

    The order matters: what is refused in a layer is seen by all those outside it.
    """
    app.add_middleware(
        BodyMiddleware,
        max_bytes=settings.max_body_bytes,
        max_buffered_bytes=settings.max_buffered_bytes,
        timeout_seconds=settings.body_timeout_seconds,
        metrics=metrics,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", ID_HEADER],
            expose_headers=[ID_HEADER, "Retry-After"],
        )
    app.add_middleware(RequestMiddleware, metrics=metrics)
    app.add_middleware(tracer.middleware)
