"""Logs of the service: rlhf's lines, with the id of the request that each belongs to."""

from __future__ import annotations

import logging
import sys
from typing import Any

from app.requests import current_request_id
from rlhf.telemetry import JsonFormatter, configure_logging


class RequestJsonFormatter(JsonFormatter):
    """One JSON object a line, with the facts that a record brings and its request's id."""

    def facts(self, record: logging.LogRecord) -> dict[str, Any]:
        """What every line has, then these."""
        request_id = current_request_id()
        return super().facts(record) | ({"request_id": request_id} if request_id else {}) | getattr(record, "facts", {})


class RequestFormatter(logging.Formatter):
    """A line for a person, ended by its request's id."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message; for the access log the seconds, too."""
        line = super().format(record)
        if facts := getattr(record, "facts", None):
            line += f" {facts['seconds']:.3f} s"
        request_id = current_request_id()
        return f"{line} [{request_id}]" if request_id else line


def configure_service_logging(level: str) -> None:
    """JSON lines on stderr, or lines for a person on a terminal; from `level` on. Only the entry point calls this."""
    configure_logging()
    for name in ("rlhf", "app"):
        logging.getLogger(name).setLevel(level.upper())
    human = RequestFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(human if sys.stderr.isatty() else RequestJsonFormatter())
