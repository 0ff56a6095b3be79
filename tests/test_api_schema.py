"""The service against its own OpenAPI document: requests of every shape, and no answer outside what is documented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig

from app.keys import new_key
from app.main import create_app
from app.problems import MEDIA_TYPE
from app.schemas import MAX_TOKEN_ID
from app.service import Service
from app.settings import Settings
from tests.fakes import POSITIONS, SHAPE
from tests.served_run import MAX_RESPONSE_TOKENS, served_run
from tests.serving import Serving, serving_run

MOST_CANDIDATES, MOST_SECONDS = 4, 60.0

# 413: a body may be too large before it is anything else. Otherwise a 4xx here says that the fields are wrong.
CHECKS = {
    "positive_data_acceptance": {"expected-statuses": ["200", "413", "422"]},
    "negative_data_rejection": {"expected-statuses": ["405", "413", "415", "422"]},
}
CONFIG = {
    "seed": 1,
    "generation": {
        "max-examples": 100,
        "deterministic": True,
        "database": "none",
        "with-security-parameters": False,  # every request carries a good key; `ignored_auth` takes it away
    },
    "checks": CHECKS,
}


def own_document() -> dict[str, Any]:
    settings = Settings(run_dir=Path())
    return create_app(settings, Service(settings)).openapi()


DOCUMENT = own_document()
API = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig.from_dict(CONFIG))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service that asks for a key everywhere, with every client of it knowing one."""
    folder = tmp_path_factory.mktemp("api_schema")
    key, line = new_key("tester")
    for name in ("keys", "admin-keys"):
        (folder / name).write_text(f"{line}\n", encoding="utf-8")
    with serving_run(
        served_run(folder),
        api_keys_file=folder / "keys",
        admin_keys_file=folder / "admin-keys",
        max_best_of=MOST_CANDIDATES,
        timeout_seconds=MOST_SECONDS,
    ) as started:
        started.client.headers["Authorization"] = f"Bearer {key}"
        yield started


@API.parametrize()
def test_no_answer_is_outside_the_document(case: schemathesis.Case, serving: Serving) -> None:
    """Valid requests and invalid ones: no 5xx, documented statuses, types and bodies, keys asked for, methods refused.

    A request that breaks the document is refused, whatever is broken.
    """
    within_the_settings(case)
    response = case.call_and_validate(base_url=serving.url, headers=key_of(serving))
    assert response.status_code < 500
    if response.status_code >= 400:
        problem = response.json()
        assert problem["request_id"] == response.headers["x-request-id"][0]
        assert problem["status"] == response.status_code


@pytest.mark.parametrize("path", ["/summarize", "/score"])
def test_most_valid_requests_are_answered(path: str, serving: Serving) -> None:
    """What is refused is refused for a reason that no schema tells: a blank post, or one that does not fit."""
    statuses = []

    @hypothesis.settings(max_examples=50, derandomize=True, database=None, deadline=None)
    @hypothesis.given(case=API[path]["POST"].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        within_the_settings(case)
        response = case.call_and_validate(base_url=serving.url, headers=key_of(serving))
        statuses.append(response.status_code)

    ask()
    assert set(statuses) <= {200, 413, 422}
    assert statuses.count(200) > len(statuses) / 2


def key_of(serving: Serving) -> dict[str, str]:
    return {"Authorization": serving.client.headers["Authorization"]}


def within_the_settings(case: schemathesis.Case) -> None:
    """Bring down what the document allows and this service's settings do not; what is invalid stays invalid.

    Posts are cut rather than refused, so that nothing but the change that was made to a request can be its fault. No
    time limit is so short that it passes: 504 is the right answer then, and another test's concern.
    """
    if not isinstance(case.body, dict):
        return
    if case.body.get("truncation", "error") == "error":
        case.body["truncation"] = "body"
    for field, most in (("max_new_tokens", MAX_RESPONSE_TOKENS), ("best_of", MOST_CANDIDATES)):
        if type(value := case.body.get(field)) is int and value > most:
            case.body[field] = most
    for item in case.body.get("items") or () if isinstance(case.body.get("items"), list) else ():
        if isinstance(item, dict) and isinstance(ids := item.get("token_ids"), list):
            item["token_ids"] = [known(token) for token in ids[:POSITIONS]]
    if type(value := case.body.get("timeout_seconds")) in (int, float) and value > 0:
        case.body["timeout_seconds"] = MOST_SECONDS


def known(token: Any) -> Any:
    """An id that the model knows, for one that the document allows; a whole number may be drawn as 3.0."""
    if type(token) in (int, float) and 0 <= token <= MAX_TOKEN_ID and token == int(token):
        return int(token) % SHAPE.vocab_size
    return token


def test_the_document_is_openapi() -> None:
    API.validate()


def test_the_document_is_the_one_that_is_served(serving: Serving) -> None:
    answer = serving.client.get("/openapi.json")
    assert answer.json() == DOCUMENT


def test_every_reference_in_the_document_resolves() -> None:
    found = set(references(DOCUMENT))
    assert found
    for reference in found:
        node = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_schema_in_the_document_is_used() -> None:
    """Such as FastAPI's own error, which this service never answers with."""
    used = {reference.rpartition("/")[2] for reference in references(DOCUMENT)}
    assert set(DOCUMENT["components"]["schemas"]) == used


def test_every_error_in_the_document_is_a_problem() -> None:
    probes = ("/livez", "/readyz", "/startupz")
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            errors = {status: answer for status, answer in operation["responses"].items() if status[0] in "45"}
            if path in probes:
                assert set(errors) == {"503"}
                continue
            for answer in errors.values():
                assert set(answer["content"]) == {MEDIA_TYPE}
                assert answer["description"]


@pytest.mark.parametrize(
    ("path", "method", "statuses"),
    [
        ("/summarize", "post", "200 401 408 413 415 422 429 500 503 504"),
        ("/score", "post", "200 401 408 413 415 422 429 500 503 504"),
        ("/v1/models", "get", "200 401 429 503"),
        ("/admin/reload", "post", "200 401 403 409 503"),
        ("/livez", "get", "200 503"),
        ("/readyz", "get", "200 503"),
        ("/startupz", "get", "200 503"),
        ("/metrics", "get", "200"),
    ],
)
def test_the_document_names_every_status(path: str, method: str, statuses: str) -> None:
    assert sorted(DOCUMENT["paths"][path][method]["responses"]) == statuses.split()


def test_the_document_says_what_needs_a_key() -> None:
    locked = {
        path for path, operations in DOCUMENT["paths"].items() for each in operations.values() if "security" in each
    }
    assert locked == {"/summarize", "/score", "/v1/models", "/admin/reload"}


def test_the_document_holds_nothing_else() -> None:
    assert sorted(DOCUMENT["paths"]) == sorted(
        ["/summarize", "/score", "/v1/models", "/admin/reload", "/livez", "/readyz", "/startupz", "/metrics"]
    )


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(reference := node.get("$ref"), str):
            yield reference
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)
