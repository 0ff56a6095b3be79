"""What FastAPI and Starlette raise, told as problem documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.metrics import Metrics
from app.problems import (
    FORBIDDEN,
    INTERNAL,
    INVALID_REQUEST,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    UNAUTHORIZED,
    UNSUPPORTED_MEDIA_TYPE,
    ProblemError,
    problem_response,
)
from app.schemas import FieldProblem

MAX_FIELDS = 100
MAX_ERRORS = 10 * MAX_FIELDS
OBJECT_EXPECTED = ("model_type", "model_attributes_type", "dict_type")
WRONG_TYPE = (*OBJECT_EXPECTED, "string_type")
BY_STATUS = {
    kind.status: kind
    for kind in (FORBIDDEN, INVALID_REQUEST, METHOD_NOT_ALLOWED, NOT_FOUND, UNAUTHORIZED, UNSUPPORTED_MEDIA_TYPE)
}


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer ProblemError, a request that does not validate, and Starlette's own errors; count each by its kind.

    An exception that nobody expected is not handled here: RequestMiddleware answers it.
    """

    def answer(request: Request, error: ProblemError, headers: Mapping[str, str] | None = None) -> Response:
        metrics.refused(error.kind.name)
        return problem_response(error, request.scope, headers=headers)

    @app.exception_handler(ProblemError)
    async def answer_problem(request: Request, error: ProblemError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, invalid_request(error))

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's for a body that is not UTF-8 or is nested too deep
            problem = ProblemError(INVALID_REQUEST, "the body is not JSON in UTF-8")
        else:
            problem = ProblemError(BY_STATUS.get(error.status_code, INTERNAL), _detail(request, error))
        return answer(request, problem, error.headers)


def _detail(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"no page at {request.url.path}"
    if error.status_code == 405:
        return f"{request.url.path} does not take {request.method}"
    return str(error.detail)


def invalid_request(error: RequestValidationError) -> ProblemError:
    """The fields that are wrong, each with all that is wrong with it; never what was sent in them."""
    if isinstance(error.body, bytes):  # FastAPI decodes a body only when its Content-Type says JSON
        return ProblemError(UNSUPPORTED_MEDIA_TYPE, "the request has no header Content-Type: application/json")
    fields = field_problems(error.errors()[:MAX_ERRORS], error.body)
    first = f"{fields[0].field}: {fields[0].message}"
    if len(fields) > 1:
        count = str(len(fields)) if len(fields) <= MAX_FIELDS else f"more than {MAX_FIELDS}"
        first = f"{count} fields are wrong; the first is {first}"
    return ProblemError(INVALID_REQUEST, first, errors=fields[:MAX_FIELDS])


def field_problems(errors: Sequence[Any], body: Any) -> list[FieldProblem]:
    """Pydantic's errors by field, in their order.

    Of a value that may be several things, only the errors of the thing it looks like count: {"body": 3} is a post
    with a wrong body, not a failed text.
    """
    paths = [_path(error, body) for error in errors]
    right_type = {path for path, error in zip(paths, errors, strict=True) if error["type"] not in WRONG_TYPE}
    looked_into = {path[:end] for path in paths for end in range(len(path))}
    messages: dict[tuple[str, ...], list[str]] = {}
    for path, error in zip(paths, errors, strict=True):
        if error["type"] in WRONG_TYPE and (path in right_type or path in looked_into):
            continue
        messages.setdefault(path, []).append(_message(error))
    return [
        FieldProblem(field=".".join(path) or "body", message=" or ".join(dict.fromkeys(texts)))
        for path, texts in messages.items()
    ]


def _message(error: Any) -> str:
    if error["type"] == "json_invalid":
        return f"not JSON: {error['ctx']['error']} at character {error['loc'][1]}"
    if error["type"] in OBJECT_EXPECTED:
        return "Input should be an object"
    if error["type"] == "extra_forbidden":
        return "unknown field"
    return str(error["msg"]).removeprefix("Value error, ")


def _path(error: Any, body: Any) -> tuple[str, ...]:
    """posts, 3, body from body, posts, 3, PostFields, body: pydantic adds the names of a union's branches."""
    place, *path = error["loc"]
    if place != "body":
        return tuple(map(str, error["loc"]))
    if error["type"] == "json_invalid":
        return ()
    value, kept = body, []
    for number, part in enumerate(path):
        if (isinstance(part, int) and isinstance(value, list)) or (isinstance(value, dict) and part in value):
            value = value[part]
        elif not (error["type"] == "missing" and number == len(path) - 1):
            continue
        kept.append(str(part))
    return tuple(kept)
