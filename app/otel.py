"""Traces to an OpenTelemetry collector. Only `app/tracing.py` imports this, when an endpoint is set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.tracing import NONE, Attributes
from rlhf import __version__

EXPORT_SECONDS = 5.0
UNTRACED = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
"""Asked every few seconds by machines; their spans would bury the others."""


class OpenTelemetryTracer:
    """Spans in batches, by OTLP over HTTP. It has a provider of its own and leaves OpenTelemetry's globals alone."""

    def __init__(self, endpoint: str) -> None:
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_SECONDS)
        resource = Resource.create({"service.name": "rlhf-summarizer", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("app", __version__)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application inside one that makes a span a request, as a child of the caller's `traceparent`."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in UNTRACED:
                await app(scope, receive, send)
                return
            with self._request(scope, send) as observed:
                await app(scope, receive, observed)

        return traced

    @contextmanager
    def _request(self, scope: Scope, send: Send) -> Iterator[Send]:
        method, status = scope["method"], 0

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        with self._started(method, NONE, parent=parent, kind=SpanKind.SERVER) as span:
            span.set_attribute("http.request.method", method)
            span.set_attribute("url.path", scope["path"])
            try:
                yield observed
            finally:
                span.set_attribute("request.id", scope.get("state", {}).get("request_id", ""))
                if route := getattr(scope.get("route"), "path", None):
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
                if status:
                    span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))

    @contextmanager
    def span(self, name: str, attributes: Attributes = NONE) -> Iterator[None]:
        """A span around a block, inside the span of the task that it runs in."""
        with self._started(name, attributes) as span:
            try:
                yield
            except Exception as error:
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise

    def _started(
        self, name: str, attributes: Attributes, *, parent: Context | None = None, kind: SpanKind = SpanKind.INTERNAL
    ) -> AbstractContextManager[Span]:
        # What an exception says may quote a caller's text, so OpenTelemetry does not get to see it.
        return self._tracer.start_as_current_span(
            name, parent, kind, attributes, record_exception=False, set_status_on_exception=False
        )

    def record(self, name: str, seconds: float, attributes: Attributes = NONE) -> None:
        """A span of something that ends now and took this long."""
        now = time.time_ns()
        self._tracer.start_span(name, attributes=attributes, start_time=now - int(seconds * 1e9)).end(now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
