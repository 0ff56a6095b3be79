"""What the service tells of itself: its models, its state, its metrics, and an id with everything."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from app.keys import new_key
from app.main import create_app
from app.service import Service
from app.settings import Settings
from rlhf.checkpoint import fingerprint
from rlhf.models import load_policy, load_reward_model
from tests.served_run import MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, STEPS, publish_policy, served_run
from tests.serving import Serving, refusal, serving_run

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def admin_key(run_dir: Path) -> str:
    key, line = new_key("admin")
    (run_dir / "admin-keys").write_text(f"{line}\n", encoding="utf-8")
    return key


@pytest.fixture(scope="module")
def serving(run_dir: Path, admin_key: str) -> Iterator[Serving]:
    with serving_run(run_dir, admin_keys_file=run_dir / "admin-keys") as started:
        yield started


def samples(serving: Serving) -> Samples:
    """Every number that /metrics tells, by name and labels."""
    answer = serving.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class Moves:
    """What has moved between two looks at /metrics."""

    def __init__(self, before: Samples, after: Samples) -> None:
        self._before, self._after = before, after

    def of(self, name: str, **labels: str) -> float:
        key = f"rlhf_{name}", frozenset(labels.items())
        return self._after.get(key, 0.0) - self._before.get(key, 0.0)


def test_all_models_are_told_in_full(serving: Serving, run_dir: Path) -> None:
    models = {model["id"]: model for model in serving.client.get("/v1/models").json()["models"]}
    assert list(models) == ["ppo", "sft", "reward"]
    for name, model in models.items():
        directory = (run_dir / name / "final").resolve()
        network = load_reward_model(directory) if name == "reward" else load_policy(directory)
        assert model == {
            "id": name,
            "run": "served",
            "stage": name,
            "step": STEPS[name],
            "prompt_version": "tldr-1",
            "parameters": sum(weight.numel() for weight in network.parameters()),
            "dtype": "float32",
            "device": "cpu",
            "checksum": fingerprint(directory),
            "engine": None if name == "reward" else "builtin",
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_new_tokens": None if name == "reward" else MAX_RESPONSE_TOKENS,
        }


@pytest.mark.parametrize("probe", ["/livez", "/readyz", "/startupz"])
def test_all_is_well(probe: str, serving: Serving) -> None:
    answer = serving.client.get(probe)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "phase": "serving"})


CALLS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/summarize", {"posts": ["a"]}),
    ("POST", "/summarize?stream=true", {"posts": ["a"]}),
    ("POST", "/score", {"items": [{"post": "a", "summary": "b"}]}),
    ("GET", "/v1/models", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS, ids=[path for _, path, _ in CALLS])
def test_before_it_has_loaded_it_says_so(method: str, path: str, body: Any, run_dir: Path) -> None:
    settings = Settings(run_dir=run_dir)
    service = Service(settings)
    with TestClient(create_app(settings, service)) as client:
        assert (client.get("/livez").status_code, client.get("/livez").json()["status"]) == (200, "ok")
        for probe in ("/readyz", "/startupz"):
            assert (client.get(probe).status_code, client.get(probe).json()["status"]) == (503, "starting")
        answer = client.request(method, path, json=body)
        refusal(answer, 503, "not-ready")
        assert answer.headers["retry-after"] == "5"
        service.begin_drain()
        assert (client.get("/readyz").status_code, client.get("/readyz").json()["status"]) == (503, "draining")
        assert client.get("/livez").status_code == 200
        answer = client.request(method, path, json=body)
        refusal(answer, 503, "draining")
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
    asyncio.run(service.close())


def test_summaries_are_counted(serving: Serving) -> None:
    before = samples(serving)
    body = {"posts": ["a", "bb"], "best_of": 3, "seed": 1, "temperature": 1.5, "return_candidates": True}
    answer = serving.client.post("/summarize", json=body)
    moves = Moves(before, samples(serving))
    results = answer.json()["results"]
    written = [candidate for result in results for candidate in result["candidates"]]
    tokens = sum(candidate["completion_tokens"] for candidate in written)
    read = 3 * sum(result["prompt_tokens"] for result in results)
    for reason in ("stop", "length"):
        count = sum(candidate["finish_reason"] == reason for candidate in written)
        assert moves.of("request_success_total", model="ppo", finished_reason=reason) == count
    assert moves.of("generation_tokens_total", model="ppo") == tokens
    assert moves.of("prompt_tokens_total", model="ppo") == read
    assert moves.of("prompt_tokens_total", model="reward") == read + tokens
    for name in ("reward_count", "time_to_first_token_seconds_count", "request_queue_time_seconds_count"):
        assert moves.of(name, model="ppo") == 6
    assert moves.of("request_generation_tokens_sum", model="ppo") == tokens
    assert moves.of("request_prompt_tokens_sum", model="ppo") == read
    assert moves.of("scoring_batch_size_sum") == 6
    assert 0 < moves.of("iteration_batch_size_sum", model="ppo") <= tokens
    assert moves.of("http_requests_total", route="/summarize", status="200") == 1
    assert moves.of("e2e_request_latency_seconds_count", route="/summarize") == 1
    assert moves.of("requests_abandoned_total") == 0


def test_each_model_is_counted_for_itself(serving: Serving) -> None:
    before = samples(serving)
    answer = serving.client.post("/summarize", json={"posts": ["a"], "model": "sft", "return_scores": False})
    serving.client.post("/score", json={"items": [{"post": "a", "summary": "b", "reference": "c"}]})
    moves = Moves(before, samples(serving))
    assert moves.of("generation_tokens_total", model="sft") == answer.json()["results"][0]["completion_tokens"]
    assert moves.of("generation_tokens_total", model="ppo") == 0
    assert moves.of("reward_count", model="sft") == 0
    assert moves.of("request_queue_time_seconds_count", model="reward") == 2
    assert moves.of("http_requests_total", route="/score", status="200") == 1


def test_refusals_are_counted_by_kind(serving: Serving) -> None:
    before = samples(serving)
    for query in ("", "?stream=true"):
        serving.client.post(f"/summarize{query}", json={"posts": ["TL;DR:"]})
        serving.client.post(f"/summarize{query}", json={"posts": ["a"], "timeout_seconds": 1e-6})
    serving.client.get("/nowhere")
    moves = Moves(before, samples(serving))
    assert moves.of("requests_refused_total", reason="invalid-request") == 2
    assert moves.of("requests_refused_total", reason="deadline") == 2
    assert moves.of("requests_refused_total", reason="not-found") == 1
    assert moves.of("http_requests_total", route="/summarize", status="422") == 2
    assert moves.of("http_requests_total", route="/summarize", status="504") == 2
    assert moves.of("http_requests_total", route="other", status="404") == 1


def test_nothing_runs_or_waits_once_all_are_answered(serving: Serving) -> None:
    """Soon after: a model's thread may still be counting when the last answer is there."""
    serving.client.post("/summarize", json={"posts": ["a"] * 40})
    gauges = [f"rlhf_num_requests_{state}" for state in ("running", "waiting")]
    asked = [(gauge, frozenset({("model", model)})) for gauge in gauges for model in ("ppo", "reward")]
    ends = time.monotonic() + 20
    while any((told := samples(serving))[one] for one in asked):
        assert time.monotonic() < ends, told


def test_the_models_are_in_the_metrics(serving: Serving) -> None:
    told = {dict(labels)["model"]: dict(labels) for name, labels in samples(serving) if name == "rlhf_model_info"}
    for model in serving.client.get("/v1/models").json()["models"]:
        labels = told.pop(model["id"])
        for name in ("run", "stage", "step", "prompt_version", "parameters", "dtype", "device", "checksum"):
            assert labels[name] == str(model[name])
        assert labels["engine"] == (model["engine"] or "")
    assert told == {}


@pytest.fixture
def access_log() -> Iterator[queue.SimpleQueue[dict[str, Any]]]:
    """The facts of each line of the access log, as they come: a line may come after its answer."""
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.put(record.facts)  # type: ignore[attr-defined]

    logger, handler = logging.getLogger("app.access"), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(before)
    logger.removeHandler(handler)


JSON, FORM = {"content-type": "application/json"}, {"content-type": "application/x-www-form-urlencoded"}
PROBLEMS: list[tuple[str, str, Any, dict[str, str], int, str]] = [
    ("GET", "/nowhere", None, {}, 404, "not-found"),
    ("GET", "/summarize", None, {}, 405, "method-not-allowed"),
    ("DELETE", "/livez", None, {}, 405, "method-not-allowed"),
    ("POST", "/summarize", b'{"posts": [', JSON, 422, "invalid-request"),
    ("POST", "/summarize", b'{"posts": ["\xff"]}', JSON, 422, "invalid-request"),
    ("POST", "/summarize?stream=true", b'{"posts": [""]}', JSON, 422, "invalid-request"),
    ("POST", "/summarize?stream=perhaps", b'{"posts": ["a"]}', JSON, 422, "invalid-request"),
    ("POST", "/score", b"", JSON, 422, "invalid-request"),
    ("POST", "/score", b"items=1", FORM, 415, "unsupported-media-type"),
    ("POST", "/score", b" " * 20_000_000, JSON, 413, "body-too-large"),
    ("POST", "/score", b'{"items": [{"post": "a", "summary": "b"}], "timeout_seconds": 1e-9}', JSON, 504, "deadline"),
    ("POST", "/admin/reload", None, {}, 401, "unauthorized"),
    ("POST", "/admin/reload", None, {"authorization": "Bearer wrong"}, 401, "unauthorized"),
    ("GET", "/problems/none", None, {}, 404, "not-found"),
]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "kind"),
    PROBLEMS,
    ids=[f"{method} {path} {kind}" for method, path, *_, kind in PROBLEMS],
)
def test_an_error_is_explained_and_can_be_found_in_the_log(
    method: str,
    path: str,
    content: Any,
    headers: dict[str, str],
    status: int,
    kind: str,
    serving: Serving,
    access_log: queue.SimpleQueue[dict[str, Any]],
) -> None:
    answer = serving.client.request(method, path, content=content, headers=headers)
    refusal(answer, status, kind)
    problem = answer.json()
    line = access_log.get(timeout=20)
    assert (line["request_id"], line["status"], line["method"]) == (problem["request_id"], status, method)
    assert line["path"] == problem["instance"] == path.partition("?")[0]
    explanation = serving.client.get(problem["type"])
    assert explanation.status_code == 200
    assert explanation.text.startswith(f"{problem['title']} ({kind}, HTTP {status})")


@pytest.mark.parametrize("query", ["", "?stream=true"])
@pytest.mark.parametrize("body", [{"posts": ["a"]}, {"posts": []}], ids=["good", "bad"])
def test_an_id_that_is_given_is_used_everywhere(
    query: str, body: dict[str, Any], serving: Serving, access_log: queue.SimpleQueue[dict[str, Any]]
) -> None:
    answer = serving.client.post(f"/summarize{query}", json=body, headers={"X-Request-ID": "my-own_1"})
    assert answer.headers["x-request-id"] == "my-own_1"
    assert '"my-own_1"' in answer.text
    assert access_log.get(timeout=20)["request_id"] == "my-own_1"


def test_a_reload_tells_what_it_did(serving: Serving, run_dir: Path, admin_key: str) -> None:
    def reload() -> dict[str, Any]:
        answer = serving.client.post("/admin/reload", headers={"authorization": f"Bearer {admin_key}"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["models"] == serving.client.get("/v1/models").json()["models"]
        return answer.json()

    def greedy() -> dict[str, Any]:
        return serving.client.post("/summarize", json={"posts": ["a"]}).json()

    before, first = samples(serving), greedy()
    assert reload()["changed"] is False
    directory = publish_policy(run_dir, "ppo", step=99, seed=1234)
    again = reload()
    assert again["changed"] is True
    [model] = [model for model in again["models"] if model["id"] == "ppo"]
    assert (model["step"], model["checksum"]) == (99, fingerprint(directory))
    second = greedy()
    assert second["step"] == 99
    assert second["results"][0]["summary"] != first["results"][0]["summary"]
    moves = Moves(before, samples(serving))
    assert [moves.of("reloads_total", result=result) for result in ("changed", "unchanged", "failed")] == [1, 1, 0]
