"""Traces: spans for requests and for what is done for them, or nothing at all.

Without an endpoint nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from starlette.types import ASGIApp

from rlhf.errors import ConfigError

Attributes = Mapping[str, str | int | float | bool]
NONE: Attributes = {}


class Tracer(Protocol):
    """Where spans go. They are children of the request's span when they begin in its task or in one it started."""

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application inside one that makes a span a request."""
        ...

    def span(self, name: str, attributes: Attributes = NONE) -> AbstractContextManager[object]:
        """A span around a block; an exception that leaves the block marks it as failed."""
        ...

    def record(self, name: str, seconds: float, attributes: Attributes = NONE) -> None:
        """A span of something that ends now and took this long; for what a thread did meanwhile."""
        ...

    def close(self) -> None:
        """Send what is left; also done when the process ends."""
        ...


class NoTracer:
    """Does nothing."""

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application itself."""
        return app

    def span(self, name: str, attributes: Attributes = NONE) -> AbstractContextManager[object]:
        """An empty context."""
        return nullcontext()

    def record(self, name: str, seconds: float, attributes: Attributes = NONE) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def start_tracing(endpoint: str | None) -> Tracer:
    """Spans to the OpenTelemetry collector at this base address, by OTLP over HTTP; nowhere without one.

    OTEL_* variables that OpenTelemetry itself reads (sampling, headers, resource) work as documented there. Raises
    ConfigError when the packages are missing.
    """
    if endpoint is None:
        return NoTracer()
    try:
        from app.otel import OpenTelemetryTracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"APP_OTLP_ENDPOINT={endpoint} needs OpenTelemetry, which is not installed ({error.name}); "
            "install the extra: pip install '.[otel]' in this project's folder"
        ) from error
    return OpenTelemetryTracer(endpoint)
