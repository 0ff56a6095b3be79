"""A thousand mixed requests, a third of them bad or abandoned: no good one is lost, and nothing is left of any."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live_service import PATIENCE_SECONDS, LiveService, events_of, live_service, problem_in, request_bytes, until
from tests.served_run import served_run
from tests.tiny_run import THINGS

CALLERS = 32
WARM_UP, HALF = 200, 400
MEBIBYTE = 2**20
MOST_BYTES = 8 * MEBIBYTE
"""By which the process may grow from one half to the next: 20 KiB kept of every request would be found."""

Json = dict[str, Any]
Act = Callable[[httpx.AsyncClient, int], Awaitable[None]]
"""What a caller does once, by a client or on a connection of its own to the port; whatever is wrong is raised."""


@dataclass(frozen=True)
class Good:
    """A request that must be answered, always in the same way."""

    path: str
    body: Json

    async def ask(self, client: httpx.AsyncClient) -> list[Json]:
        """The results; of a stream, those that its events bring."""
        answer = await client.post(self.path, json=self.body)
        assert answer.status_code == 200, answer.text
        if "stream" not in self.path:
            return list(answer.json()["results"])
        *events, (last, _) = events_of(answer.text)
        assert last == "done"
        return sorted((data for name, data in events if name == "result"), key=lambda result: int(result["index"]))


def good_requests() -> list[Good]:
    bodies = [f"I lost my {thing}" for thing in THINGS]
    requests = [Good("/summarize", {"posts": [body]}) for body in bodies]
    requests += [Good("/summarize?stream=true", {"posts": bodies[start : start + 2]}) for start in (0, 2, 4)]
    requests += [
        Good("/summarize", {"posts": [f"{bodies[0]} today" * 20, *bodies[1:3]], "truncation": "body"}),
        Good("/summarize", {"posts": bodies[3:5], "model": "sft", "max_new_tokens": 9}),
        Good("/summarize", {"posts": bodies[5:6], "temperature": 0.7, "top_p": 0.9, "seed": 3, "return_scores": False}),
        Good("/summarize", {"posts": bodies[6:7], "best_of": 3, "seed": 5, "return_candidates": True}),
    ]
    for start in range(4):
        items = [{"post": body, "summary": "lost", "reference": body} for body in bodies[start : start + 3]]
        requests += [Good("/score", {"items": items})] * 2
    return requests


def same(found: Any, expected: Any) -> bool:
    """Whether two results are equal, scores to what other company in a batch may change."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected))


def answered(good: Good, expected: list[Json]) -> Act:
    async def act(client: httpx.AsyncClient, port: int) -> None:
        found = await good.ask(client)
        assert same(found, expected), f"{good}: {found} instead of {expected}"

    return act


def refused(kind: str, path: str, body: bytes, content_type: str = "application/json") -> Act:
    async def act(client: httpx.AsyncClient, port: int) -> None:
        answer = await client.post(path, content=body, headers={"Content-Type": content_type})
        assert problem_in(answer)[1] == f"/problems/{kind}"

    return act


def abandoned(path: str, body: bytes, *, after: bytes | float, announced: int | None = None) -> Act:
    """Hang up after so many seconds, or once these bytes have come; `announced` is what Content-Length claims."""

    async def act(client: httpx.AsyncClient, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes(path, body, Content_Length=str(announced or len(body))))
        if isinstance(after, bytes):
            await asyncio.wait_for(reader.readuntil(after), PATIENCE_SECONDS)
        else:
            await asyncio.sleep(after)
        writer.transport.abort()

    return act


def posts(*bodies: str, **options: Any) -> bytes:
    return json.dumps({"posts": bodies, **options}).encode()


ONE, LONG = posts("I lost my cat"), posts("I lost my cat " * 50)
MANY = posts(*(f"I lost cat number {number}" for number in range(10)))
BAD: Sequence[Act] = (
    refused("invalid-request", "/summarize", ONE[:-2]),
    refused("invalid-request", "/summarize", b'{"posts": ["\xff"]}'),
    refused("invalid-request", "/summarize", LONG),
    refused("invalid-request", "/summarize?stream=true", LONG),
    refused("invalid-request", "/score", b'{"items": [{"post": "a", "summary": 3}]}'),
    refused("unsupported-media-type", "/summarize", ONE, "text/plain"),
    refused("deadline", "/summarize", posts("I lost my cat", timeout_seconds=0.001)),
    refused("not-found", "/nowhere", ONE),
    abandoned("/summarize", MANY, after=0.0),
    abandoned("/summarize", MANY, after=0.02),
    abandoned("/summarize", MANY, after=0.1),
    abandoned("/summarize?stream=true", MANY, after=b"event: token"),
    abandoned("/summarize?stream=true", MANY, after=b"event: result"),
    abandoned("/summarize", ONE[:5], after=0.0, announced=len(ONE)),
    abandoned("/summarize", ONE, after=b'"request_id":', announced=100 * MEBIBYTE),
    abandoned("/score", ONE, after=0.0),
)


def mixed(count: int, good: Sequence[Act], *, seed: int) -> list[Act]:
    """So many acts, every third of them bad."""
    chance = random.Random(seed)
    return [chance.choice(BAD if number % 3 == 2 else good) for number in range(count)]


async def ask_alone(service: LiveService, requests: Sequence[Good]) -> list[Act]:
    """What each request is answered when there is no other, as what callers must find later."""
    async with async_client(service) as client:
        return [answered(good, await good.ask(client)) for good in requests]


async def act_together(service: LiveService, acts: Sequence[Act]) -> None:
    """All of these by callers at the same time; the first that finds something wrong fails."""
    work = iter(acts)

    async def call() -> None:
        for act in work:
            await act(client, service.port)

    async with async_client(service) as client, asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(call())


def async_client(service: LiveService) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=service.client.base_url, timeout=PATIENCE_SECONDS, trust_env=False)


@dataclass(frozen=True)
class State:
    """What a process holds."""

    threads: int
    files: int
    memory: int
    objects: int


def at_rest(service: LiveService, tasks: list[str]) -> State:
    """What is held once all work is done: nothing runs or waits, and no task beside these is left."""
    process = psutil.Process(service.process.pid)
    until(lambda: service.in_progress() == (0, 0))
    until(lambda: service.report()["tasks"] == tasks)
    until(lambda: sum(peer.status == "ESTABLISHED" for peer in process.net_connections("tcp")) <= 1)
    objects = service.report()["objects"]
    return State(process.num_threads(), process.num_fds(), service.memory_bytes, objects)


def test_of_a_thousand_mixed_requests_no_good_one_is_lost_and_nothing_stays(tmp_path: Path) -> None:
    with live_service(served_run(tmp_path), tmp_path / "log", hooks=tmp_path, slots=8, max_best_of=8) as service:
        tasks = service.report()["tasks"]
        good = asyncio.run(ask_alone(service, good_requests()))
        states = []
        for seed, count in enumerate((WARM_UP, HALF, HALF)):
            asyncio.run(act_together(service, mixed(count, good, seed=seed)))
            states.append(at_rest(service, tasks))
        warm, half, whole = states
        assert whole.threads <= warm.threads
        assert whole.files <= warm.files
        assert whole.objects - half.objects < HALF, "more than one object is kept of each request"
        assert whole.memory - half.memory < MOST_BYTES
        assert service.metric("rlhf_requests_abandoned_total") > 0
        assert service.complaints() == []
        assert service.stop() == 0
