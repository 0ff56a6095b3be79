"""The whole service in a thread: real tiny models, real uvicorn, a real socket on a free port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.main import create_app
from app.problems import MEDIA_TYPE
from app.server import Server, listen
from app.service import Service
from app.settings import Settings
from rlhf.prompt import Post

THINGS = ("cat", "dog", "car", "house", "boss", "cake", "phone", "exam", "key", "job", "bike", "bag")


@dataclass(frozen=True)
class Serving:
    """A service that has loaded; `client` sends to it."""

    url: str
    service: Service
    client: httpx.Client


class _Announcing(Service):
    """A service that tells another thread when it has loaded, or why it has not."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.loaded = threading.Event()
        self.failure: BaseException | None = None

    async def load(self) -> None:
        try:
            await super().load()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.loaded.set()


@contextmanager
def serving_run(run_dir: Path, **settings: Any) -> Iterator[Serving]:
    """Serve a run until the block ends; `settings` are those of app.settings."""
    chosen = Settings(run_dir=run_dir, port=0, threads=1, **settings)
    service = _Announcing(chosen)
    server = Server(create_app(chosen, service), service, chosen)

    def run() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve([listener]))

    with listen(chosen.host, chosen.port) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert service.loaded.wait(timeout=60), "the service did not load"
            assert service.failure is None, service.failure
            url = f"http://{chosen.host}:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Serving(url, service, client)
        finally:
            server.config.timeout_graceful_shutdown = 1
            server.should_exit = True
            thread.join()


def post_of(number: int) -> Post:
    """One of 48 short posts, all different."""
    thing = THINGS[number % len(THINGS)]
    return Post("pets", f"my {thing}", f"I lost my {thing}" + " today" * (number // len(THINGS) % 4))


def fields(post: Post) -> dict[str, str]:
    """A post as it is sent."""
    return {"subreddit": post.subreddit, "title": post.title, "body": post.body}


def refusal(answer: httpx.Response, status: int = 422, kind: str = "invalid-request") -> dict[str, str]:
    """By field, what is wrong; after a look at the rest of the problem document."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    problem = answer.json()
    assert (problem["status"], problem["type"]) == (status, f"/problems/{kind}")
    assert (problem["instance"], problem["request_id"]) == (answer.request.url.path, answer.headers["x-request-id"])
    return {error["field"]: error["message"] for error in problem.get("errors", [])}
