"""What batching across callers gains the service: `make bench-service`.

The service runs as its own process, on a GPT-J of 6 blocks × 256 with random weights and a reward model of the same
size. Every request is one post of about 100 tokens that gets a summary of 48 tokens and its score. Compared are

- one at a time: the same service and engine with one slot, so that a summary begins when the one before has ended;
- batched: 32 slots, the default.

Then requests arrive at random at half the rate that the batched service managed, as from strangers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from rlhf.config import Config, TinyModelConfig
from rlhf.models import create_tiny_gptj
from rlhf.runtime import announce_device
from tests.fakes import EOS_ID, PAD_ID, tiny_reward_model
from tests.live_service import live_service
from tests.served_run import publish_model

SHAPE = TinyModelConfig(layers=6, hidden=256, heads=8, rotary_dim=32, vocab_size=2048)
PROMPT_TOKENS, SUMMARY_TOKENS = 112, 48
WORDS = ("my", "dog", "cat", "ate", "the", "cake", "and", "now", "is", "sad", "so", "i", "want", "to", "know")


@dataclass(frozen=True)
class Load:
    """What callers saw: requests a second, and how long an answer took, in milliseconds."""

    requests_per_second: float
    mean_ms: float
    p95_ms: float


def main() -> None:
    """Measure, print a table, and write JSON where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=512, help="of the batched measurements")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--threads", type=int, help="CPU threads of each model (default: the service's own)")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    results = measure(requests=options.requests, callers=options.callers, threads=options.threads)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(*, requests: int, callers: int, threads: int | None) -> dict[str, object]:
    """All loads, and the two ratios that matter."""
    announce_device()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        run_dir, log = publish_run(Path(folder)), Path(folder, "log")
        few = max(requests // 8, 8)
        chosen = {"models": "ppo", "threads": "" if threads is None else threads}  # empty: the service's own choice
        with live_service(run_dir, log, slots=1, max_best_of=1, max_wait_seconds=600, **chosen) as service:
            alone = asyncio.run(closed_load(service.port, few, 1))
            queued = asyncio.run(closed_load(service.port, few, callers))
        with live_service(run_dir, log, **chosen) as service:
            batched = asyncio.run(closed_load(service.port, requests, callers))
            half = asyncio.run(open_load(service.port, requests // 2, batched.requests_per_second / 2))
    baseline = max(alone.requests_per_second, queued.requests_per_second)
    return {
        "one at a time, 1 caller": asdict(alone),
        f"one at a time, {callers} callers": asdict(queued),
        f"batched, {callers} callers": asdict(batched),
        "batched, half load": asdict(half),
        "speedup": batched.requests_per_second / baseline,
        "p95 over mean at half load": half.p95_ms / half.mean_ms,
    }


def table(results: dict[str, object]) -> str:
    """For people."""
    lines = [f"{'':34}{'requests/s':>11}{'mean ms':>9}{'p95 ms':>9}"]
    for name, load in results.items():
        if isinstance(load, dict):
            lines.append(f"{name:34}{load['requests_per_second']:11.1f}{load['mean_ms']:9.0f}{load['p95_ms']:9.0f}")
        else:
            lines.append(f"{name:34}{load:11.2f}")
    return "\n".join(lines)


def publish_run(runs_dir: Path) -> Path:
    """A run whose policy never ends a summary by itself."""
    policy = create_tiny_gptj(
        SHAPE,
        positions=PROMPT_TOKENS + SUMMARY_TOKENS,
        vocab_size=SHAPE.vocab_size,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        seed=1,
    )
    with torch.no_grad():
        policy.lm_head.bias[EOS_ID:] = -1e4  # no end, and nothing beyond the bytes, which could not be decoded
    config = Config.model_validate(
        {"prompt": {"max_prompt_tokens": PROMPT_TOKENS, "max_response_tokens": SUMMARY_TOKENS}}
    )
    run_dir = runs_dir / "bench"
    publish_model(run_dir, "ppo", policy, step=1, config=config)
    publish_model(run_dir, "reward", tiny_reward_model(policy), step=1, config=config)
    return run_dir


class Caller:
    """One connection, kept open; plain sockets, since a client library would cost more than the service."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Caller:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()

    async def ask(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request, read the answer; its status."""
        head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self._writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        await self._reader.readexactly(int(answer.split("content-length: ")[1].split("\r\n")[0]))
        return int(answer.split()[1])

    async def summarize(self, number: int) -> float:
        """Ask for a summary; seconds until it was there."""
        begun = time.perf_counter()
        status = await self.ask("POST", "/summarize", request_body(number))
        assert status == 200, f"the service answered {status}"
        return time.perf_counter() - begun


def request_body(number: int) -> bytes:
    """A post of its own for every number."""
    chooser = random.Random(number)
    body = " ".join(chooser.choices(WORDS, k=20))[:64]
    return json.dumps({"posts": [{"subreddit": "pets", "title": f"post {number}", "body": body}]}).encode()


async def closed_load(port: int, requests: int, callers: int) -> Load:
    """Each caller asks again as soon as it has its answer."""
    numbers, seconds = iter(range(requests)), []

    async def call() -> None:
        async with Caller(port) as caller:
            for number in numbers:
                seconds.append(await caller.summarize(number))

    begun = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return load_of(seconds, time.perf_counter() - begun)


async def open_load(port: int, requests: int, per_second: float) -> Load:
    """Strangers who come at random, at this rate on average, whether or not others have been answered."""
    chooser, seconds = random.Random(1), []

    async def call(number: int) -> None:
        async with Caller(port) as caller:
            seconds.append(await caller.summarize(number))

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as strangers:
        for number in range(requests):
            strangers.create_task(call(number))
            await asyncio.sleep(chooser.expovariate(per_second))
    return load_of(seconds, time.perf_counter() - begun)


def load_of(seconds: list[float], wall_seconds: float) -> Load:
    """The summary of all answers."""
    return Load(
        requests_per_second=len(seconds) / wall_seconds,
        mean_ms=1000 * statistics.mean(seconds),
        p95_ms=1000 * statistics.quantiles(seconds, n=20)[-1],
    )


if __name__ == "__main__":
    main()
