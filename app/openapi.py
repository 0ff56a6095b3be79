"""The service's description of itself, and how its errors stand in it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.problems import KINDS, MEDIA_TYPE
from app.schemas import DoneEvent, Problem, Summary, TokenEvent

REFERENCE = "#/components/schemas/{model}"


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's `responses` for these statuses: problem documents, with what each can mean."""
    titles = defaultdict(list)
    for kind in KINDS:
        titles[kind.status].append(kind.title)
    schema = {"$ref": REFERENCE.format(model=Problem.__name__)}
    return {
        status: {"description": "; ".join(titles[status]), "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def events() -> dict[str, Any]:
    """The schema of each event of a stream, in which it is an object of its fields."""
    told: dict[str, type[BaseModel]] = {"token": TokenEvent, "result": Summary, "done": DoneEvent, "error": Problem}
    return {"type": "object", "oneOf": [_event(name, model) for name, model in told.items()]}


def _event(name: str, model: type[BaseModel]) -> dict[str, Any]:
    data = {"$ref": REFERENCE.format(model=model.__name__)}
    return {
        "properties": {
            "event": {"const": name},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
        "required": ["event", "data"],
    }


def describe(app: FastAPI) -> None:
    """Make /openapi.json hold the schemas that no route's model brings along: problems and events."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schemas = document["components"]["schemas"]
            for model in (Problem, TokenEvent, DoneEvent):
                schema = model.model_json_schema(ref_template=REFERENCE)
                schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
