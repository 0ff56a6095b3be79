"""Errors as problem documents: what a caller reads when something is wrong."""

import json
from typing import Annotated, Any, Self

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import Field, model_validator

from app import problems
from app.error_handlers import add_error_handlers
from app.metrics import Metrics
from app.problems import KINDS, Kind, ProblemError, problem_page, problem_response
from app.schemas import FieldProblem, Problem, Schema

SCOPE = {"type": "http", "path": "/summarize", "state": {"request_id": "r-1"}}


class Post(Schema):
    title: str = ""
    body: str


class Wanted(Schema):
    """A request with a field that may be one of two things, and a rule about two fields."""

    posts: list[Post | Annotated[str, Field(min_length=1)]]
    seed: int = Field(0, ge=0)
    best_of: int = 1
    greedy: bool = False

    @model_validator(mode="after")
    def _greedy_is_alone(self) -> Self:
        if self.greedy and self.best_of > 1:
            raise ValueError("best_of above 1 needs greedy=false")
        return self


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    add_error_handlers(app, Metrics())

    @app.post("/summarize")
    def summarize(request: Wanted, stream: bool = False) -> None: ...

    @app.get("/busy")
    def busy() -> None:
        raise ProblemError(problems.QUEUE_FULL, "200 of 200 tokens wait", retry_after=2.1)

    return TestClient(app)


def test_a_problem_says_what_rfc_9457_asks_for() -> None:
    wrong = FieldProblem(field="posts.3.body", message="too long")
    response = problem_response(ProblemError(problems.INVALID_REQUEST, "1 field", errors=[wrong]), SCOPE)
    assert (response.status_code, response.media_type) == (422, "application/problem+json")
    assert json.loads(response.body) == {
        "type": "/problems/invalid-request",
        "title": "The request is malformed",
        "status": 422,
        "detail": "1 field",
        "instance": "/summarize",
        "request_id": "r-1",
        "errors": [{"field": "posts.3.body", "message": "too long"}],
    }


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (problems.QUEUE_FULL, 2.1, "3"),
        (problems.QUEUE_FULL, 0.0, "1"),
        (problems.QUEUE_FULL, None, "1"),
        (problems.NOT_READY, None, "5"),
        (problems.INVALID_REQUEST, None, None),
    ],
)
def test_retry_after_is_whole_seconds_and_at_least_one(kind: Kind, given: float | None, told: str | None) -> None:
    response = problem_response(ProblemError(kind, "busy", retry_after=given), SCOPE)
    assert response.headers.get("retry-after") == told


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_has_a_page_that_explains_it(kind: Kind) -> None:
    page = problem_page(kind.name)
    assert kind.title.encode() in page.body
    assert kind.explanation.encode() in page.body
    if kind.status in (429, 503):
        assert kind.retry_after_seconds is not None or "Retry-After" in kind.explanation


def test_kinds_are_named_once_and_all_listed() -> None:
    defined = [value for value in vars(problems).values() if isinstance(value, Kind)]
    assert {kind.name for kind in defined} == {kind.name for kind in KINDS}
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    with pytest.raises(ProblemError, match=r"there are .*invalid-request,"):
        problem_page("no-such")


def test_a_problem_raised_by_a_route_is_told(client: TestClient) -> None:
    answer = client.get("/busy")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert Problem.model_validate(answer.json()).detail == "200 of 200 tokens wait"


EMPTY_TEXT = "String should have at least 1 character"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {"posts": "Field required"}),
        ({"posts": [{"body": 3}]}, {"posts.0.body": "Input should be a valid string"}),
        ({"posts": ["a", {"title": "t"}]}, {"posts.1.body": "Field required"}),
        ({"posts": [{"titel": "t", "body": "b"}]}, {"posts.0.titel": "unknown field"}),
        ({"posts": ["a", ""]}, {"posts.1": EMPTY_TEXT}),
        ({"posts": ["a", 5]}, {"posts.1": "Input should be an object or Input should be a valid string"}),
        (
            {"posts": ["a"], "seed": -1, "no": 1},
            {"seed": "Input should be greater than or equal to 0", "no": "unknown field"},
        ),
        ({"posts": "a"}, {"posts": "Input should be a valid list"}),
        ([], {"body": "Input should be an object"}),
        (None, {"body": "Field required"}),
        (
            {"posts": ["a"], "best_of": 2, "greedy": True},
            {"body": "best_of above 1 needs greedy=false"},
        ),
    ],
)
def test_a_malformed_request_names_the_fields(body: Any, fields: dict[str, str], client: TestClient) -> None:
    answer = client.post("/summarize", json=body)
    assert answer.status_code == 422
    problem = Problem.model_validate(answer.json())
    assert {error.field: error.message for error in problem.errors or []} == fields
    assert next(iter(fields)) in problem.detail


def test_a_wrong_query_is_told_apart_from_the_body(client: TestClient) -> None:
    answer = client.post("/summarize?stream=maybe", json={"posts": ["a"]})
    assert answer.json()["errors"][0]["field"] == "query.stream"


@pytest.mark.parametrize("body", [b'"\xff"', b"[" * 100_000], ids=["bad UTF-8", "nested too deep"])
def test_a_body_that_is_not_json_in_utf8_is_malformed(body: bytes, client: TestClient) -> None:
    answer = client.post("/summarize", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["detail"]) == (422, "the body is not JSON in UTF-8")


def test_broken_json_is_told_with_its_place(client: TestClient) -> None:
    answer = client.post("/summarize", content=b'{"posts": [}', headers={"content-type": "application/json"})
    assert answer.json()["errors"] == [{"field": "body", "message": "not JSON: Expecting value at character 11"}]


def test_another_content_type_is_415(client: TestClient) -> None:
    answer = client.post(
        "/summarize", content=b"posts=a", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert (answer.status_code, answer.json()["type"]) == (415, "/problems/unsupported-media-type")


def test_what_was_sent_is_never_told_back(client: TestClient) -> None:
    answer = client.post(
        "/summarize", json={"posts": [{"title": "my secret", "boddy": "my secret"}], "seed": "my secret"}
    )
    assert answer.status_code == 422
    assert "secret" not in answer.text


def test_thousands_of_mistakes_are_cut_short(client: TestClient) -> None:
    answer = client.post("/summarize", json={"posts": ["a"]} | {f"k{n}": 1 for n in range(20_000)})
    assert (answer.status_code, len(answer.json()["errors"])) == (422, 100)
    assert answer.json()["detail"].startswith("more than 100 fields are wrong; the first is k0")


def test_paths_and_methods_that_are_not_there(client: TestClient) -> None:
    missing = client.get("/nowhere")
    assert (missing.status_code, missing.json()["type"]) == (404, "/problems/not-found")
    wrong = client.get("/summarize")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["type"] == "/problems/method-not-allowed"


def test_problems_are_counted_by_kind() -> None:
    app, metrics = FastAPI(), Metrics()
    add_error_handlers(app, metrics)
    TestClient(app).get("/nowhere")
    assert b'rlhf_requests_refused_total{reason="not-found"} 1.0' in metrics.render()
