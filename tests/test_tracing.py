"""Traces: what a collector gets, and that nothing is there without one."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.metrics import Metrics
from app.middleware import add_middleware
from app.settings import Settings
from app.tracing import NoTracer, Tracer, start_tracing
from rlhf.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.test_server import process

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""The example of W3C Trace Context, section 3.2."""


class Collector:
    """A collector on a free port that keeps what it gets."""

    def __init__(self) -> None:
        received: list[ExportTraceServiceRequest] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self.received = received
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> dict[str, Span]:
        return {
            span.name: span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@pytest.fixture
def collector() -> Iterator[Collector]:
    collecting = Collector()
    thread = threading.Thread(target=collecting.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield collecting
    collecting.server.shutdown()
    thread.join()
    collecting.server.server_close()


def traced_app(tracer: Tracer) -> FastAPI:
    app = FastAPI()
    add_middleware(app, Settings(run_dir="."), Metrics(), tracer)

    @app.get("/posts/{number}")
    async def posts(number: int) -> None:
        with tracer.span("generate", {"posts": number}):
            tracer.record("queue", 0.25, {"model": "ppo"})

    @app.get("/boom")
    async def boom() -> None:
        with tracer.span("score"):
            raise RuntimeError("a caller's text")

    @app.get("/livez")
    async def livez() -> None: ...

    return app


def attributes(span: Span) -> dict[str, object]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_request_is_a_span_with_what_was_done_for_it_inside(collector: Collector) -> None:
    tracer = start_tracing(collector.endpoint + "/")
    asking = TestClient(traced_app(tracer))
    asking.get("/posts/3?q=1", headers={"traceparent": PARENT, "x-request-id": "r1"})
    asking.get("/livez")
    tracer.close()
    spans = collector.spans()
    assert set(spans) == {"GET /posts/{number}", "generate", "queue"}
    request, generate, queue = (spans[name] for name in ("GET /posts/{number}", "generate", "queue"))
    assert request.kind == Span.SPAN_KIND_SERVER
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert attributes(request) == {
        "http.request.method": "GET",
        "url.path": "/posts/3",
        "http.route": "/posts/{number}",
        "http.response.status_code": 200,
        "request.id": "r1",
    }
    assert (generate.trace_id, generate.parent_span_id) == (request.trace_id, request.span_id)
    assert (attributes(generate), attributes(queue)) == ({"posts": 3}, {"model": "ppo"})
    assert queue.parent_span_id == generate.span_id
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == 250_000_000


def test_a_failure_is_marked_without_its_words(collector: Collector) -> None:
    tracer = start_tracing(collector.endpoint)
    TestClient(traced_app(tracer), raise_server_exceptions=False).get("/boom")
    tracer.close()
    spans = collector.spans()
    for name in ("GET /boom", "score"):
        assert spans[name].status.code == 2, name
        assert not spans[name].events
    assert b"a caller's text" not in b"".join(request.SerializeToString() for request in collector.received)


def test_what_is_left_is_sent_when_the_process_ends(collector: Collector) -> None:
    with process(otlp_endpoint=collector.endpoint) as (server, address):
        httpx.post(f"{address}/echo", content=b"abc")
        server.terminate()
        assert server.wait(20) == 0
    assert list(collector.spans()) == ["POST /echo"]


def test_without_an_endpoint_nothing_is_imported_and_nothing_happens() -> None:
    code = (
        "import sys\nfrom app.tracing import start_tracing\nimport app.middleware\ntracer = start_tracing(None)\n"
        "with tracer.span('a', {'b': 1}): tracer.record('c', 1.0)\n"
        "tracer.close()\nsys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
    app = FastAPI()
    assert NoTracer().middleware(app) is app


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "app.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"APP_OTLP_ENDPOINT=http://c:4318 needs .*\.\[otel\]"):
        start_tracing("http://c:4318")


def test_a_collector_that_is_not_there_costs_no_request() -> None:
    with process(otlp_endpoint="http://127.0.0.1:9", leaving=0.2) as (server, address):
        assert httpx.post(f"{address}/echo", content=b"abc").json() == {"bytes": 3}
        server.terminate()
        assert server.wait(30) == 0
        assert server.stderr is not None
        for line in server.stderr.read().splitlines():
            json.loads(line)
