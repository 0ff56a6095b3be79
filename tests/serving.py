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
from app.server import Server, listen
from app.service import Service
from app.settings import Settings


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

    async def serve() -> None:
        try:
            await server.serve([listener])
        finally:
            await service.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(serve())

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
