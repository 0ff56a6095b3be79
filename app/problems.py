"""Every error that a caller can meet, as an RFC 9457 problem document with a page that explains it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from app.schemas import FieldProblem, Problem

MEDIA_TYPE = "application/problem+json"
CLOSE = (("Connection", "close"),)


@dataclass(frozen=True)
class Kind:
    """A kind of error: `name` is the last part of its address, /problems/<name>.

    The explanation says what the caller can do. retry_after_seconds is told unless the error itself knows better.
    """

    name: str
    status: int
    title: str
    explanation: str
    retry_after_seconds: float | None = None
    headers: tuple[tuple[str, str], ...] = ()


BAD_HTTP = Kind(
    "bad-http", 400, "This is not HTTP/1.1", "The bytes that came could not be read as a request.", headers=CLOSE
)
HEADERS_TOO_LARGE = Kind(
    "headers-too-large",
    431,
    "The headers are too large",
    "Send what is long in the body; cookies are of no use here.",
    headers=CLOSE,
)
INVALID_REQUEST = Kind(
    "invalid-request",
    422,
    "The request is malformed",
    "A field is missing, unknown, of the wrong type or out of its range; `errors` names each one. "
    "Correct them; /docs describes every field. The same request will fail again.",
)
NOT_FOUND = Kind("not-found", 404, "There is nothing here", "The path is not one of the service's; /docs lists them.")
METHOD_NOT_ALLOWED = Kind(
    "method-not-allowed", 405, "The path does not take this method", "The header Allow names the methods it takes."
)
UNAUTHORIZED = Kind(
    "unauthorized",
    401,
    "A valid API key is needed",
    "Send the header `Authorization: Bearer KEY`, or `X-API-Key: KEY`. Whoever runs the service makes keys with "
    "`python -m app new-key NAME`.",
    headers=(("WWW-Authenticate", "Bearer"),),
)
FORBIDDEN = Kind(
    "forbidden",
    403,
    "Not allowed",
    "/admin is only for keys of its own, kept in the file that APP_ADMIN_KEYS_FILE names; without one it is closed.",
)
UNSUPPORTED_MEDIA_TYPE = Kind(
    "unsupported-media-type",
    415,
    "The body is not JSON",
    "Send the header `Content-Type: application/json` and a JSON body in UTF-8, without Content-Encoding.",
)
BODY_TOO_LARGE = Kind(
    "body-too-large",
    413,
    "The body is too large",
    "Send fewer posts in a request; APP_MAX_BODY_BYTES sets the limit. The connection was closed.",
    headers=CLOSE,
)
BODY_TOO_SLOW = Kind(
    "body-too-slow",
    408,
    "The body did not arrive in time",
    "The whole body must arrive within APP_BODY_TIMEOUT_SECONDS. Send it again, or in smaller parts. "
    "The connection was closed.",
    headers=CLOSE,
)
TOO_MANY_REQUESTS = Kind(
    "too-many-requests",
    429,
    "Too many requests with this key",
    "Each key, or each address where no keys are used, may send APP_RATE_LIMIT_PER_MINUTE requests a minute. "
    "Wait as long as Retry-After says.",
)
QUEUE_FULL = Kind(
    "queue-full",
    429,
    "The queue is full",
    "More work is waiting than the service takes on. Wait as long as Retry-After says, and longer after each refusal.",
    retry_after_seconds=1,
)
WAITED_TOO_LONG = Kind(
    "waited-too-long",
    429,
    "The request waited too long in the queue",
    "Its turn did not come within APP_MAX_WAIT_SECONDS; no work was done. Wait as long as Retry-After says.",
    retry_after_seconds=1,
)
NOT_READY = Kind(
    "not-ready",
    503,
    "The service is loading",
    "The models are being read; /startupz names the phase. Wait as long as Retry-After says.",
    retry_after_seconds=5,
)
DRAINING = Kind(
    "draining",
    503,
    "The service is stopping",
    "It finishes what it has accepted and takes nothing new. Ask again: another instance, or the next one, answers.",
    retry_after_seconds=1,
    headers=CLOSE,
)
OVERLOADED = Kind(
    "overloaded",
    503,
    "Too many connections",
    "APP_MAX_CONNECTIONS are open. Wait as long as Retry-After says, and use one connection for many requests.",
    retry_after_seconds=1,
    headers=CLOSE,
)
DEADLINE = Kind(
    "deadline",
    504,
    "The request took too long",
    "It was given up after its `timeout_seconds`, of which APP_TIMEOUT_SECONDS is the most. "
    "Ask for fewer posts, fewer candidates or shorter summaries.",
)
RELOAD_FAILED = Kind(
    "reload-failed",
    409,
    "The new checkpoint was not loaded",
    "What was served before is still served. The detail says what is wrong with the new one.",
)
NO_ROOM = Kind(
    "no-room",
    409,
    "There is no memory for two models",
    "A reload holds the old and the new models side by side for a moment. Restart the service instead, "
    "or give it more memory.",
)
INTERNAL = Kind(
    "internal",
    500,
    "The service failed",
    "This is a fault of the service. Its log holds the reason under the request's id.",
)
SCORE_NOT_FINITE = Kind(
    "score-not-finite",
    500,
    "A score is not a finite number",
    "The reward model's numbers overflow for one of the summaries. Leave it out, or serve with APP_PRECISION=float32. "
    "For `token_ids` /score answers with null in its place.",
)
ENGINE_DEAD = Kind(
    "engine-dead",
    503,
    "A model has stopped",
    "The thread that runs the model ended; /livez fails, and whatever supervises the service restarts it.",
    retry_after_seconds=30,
)

KINDS = (
    BAD_HTTP,
    HEADERS_TOO_LARGE,
    INVALID_REQUEST,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    UNAUTHORIZED,
    FORBIDDEN,
    UNSUPPORTED_MEDIA_TYPE,
    BODY_TOO_LARGE,
    BODY_TOO_SLOW,
    TOO_MANY_REQUESTS,
    QUEUE_FULL,
    WAITED_TOO_LONG,
    NOT_READY,
    DRAINING,
    OVERLOADED,
    DEADLINE,
    RELOAD_FAILED,
    NO_ROOM,
    INTERNAL,
    SCORE_NOT_FINITE,
    ENGINE_DEAD,
)


class ProblemError(Exception):
    """A request ends with this problem; `detail` is for the caller: what is wrong here, and with which value.

    retry_after is in seconds and goes out as whole ones, at least 1.
    """

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        errors: list[FieldProblem] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{kind.name}: {detail}")
        self.kind, self.detail, self.errors = kind, detail, errors
        self.retry_after = kind.retry_after_seconds if retry_after is None else retry_after


def problem_document(error: ProblemError, scope: Scope) -> Problem:
    """What the caller reads; also the data of an `error` event in a stream that has begun."""
    return Problem(
        type=f"/problems/{error.kind.name}",
        title=error.kind.title,
        status=error.kind.status,
        detail=error.detail,
        instance=quote(scope["path"]),
        request_id=scope.get("state", {}).get("request_id", ""),
        errors=error.errors,
    )


def problem_response(error: ProblemError, scope: Scope, *, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to the request of `scope`, with the headers of its kind and these."""
    response = Response(
        problem_document(error, scope).model_dump_json(exclude_none=True),
        status_code=error.kind.status,
        headers=dict(error.kind.headers) | dict(headers or {}),
        media_type=MEDIA_TYPE,
    )
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


def problem_page(name: str) -> Response:
    """The page at /problems/<name>: what this kind of error means and what to do.

    Raises ProblemError (404) for a name that there is not.
    """
    for kind in KINDS:
        if kind.name == name:
            return PlainTextResponse(f"{kind.title} ({kind.name}, HTTP {kind.status})\n\n{kind.explanation}\n")
    raise ProblemError(NOT_FOUND, f"no problem is called {name!r}; there are {', '.join(k.name for k in KINDS)}")
