"""The service as a whole: it loads, serves, takes a new checkpoint, drains; and always knows which of these it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from app.loading import load_run
from app.memory import NoRoom
from app.metrics import Metrics
from app.problems import DRAINING, ENGINE_DEAD, NO_ROOM, NOT_READY, RELOAD_FAILED, ProblemError
from app.published import published
from app.schemas import Health, ReloadAnswer
from app.served import ServedRun
from app.settings import Settings
from app.tracing import start_tracing
from app.watch import FinalWatcher
from rlhf.errors import RlhfError

logger = logging.getLogger(__name__)

TOKENIZING_THREADS = 2

State = Literal["starting", "ready", "draining", "closed"]


class Service:
    """One run behind HTTP. All methods are for the event loop, and only `load`, `drained` and `close` take long."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError when traces are asked for and cannot be made."""
        self.settings = settings
        self.metrics = Metrics()
        self.tracer = start_tracing(settings.otlp_endpoint)
        self.tokenizing = ThreadPoolExecutor(TOKENIZING_THREADS, thread_name_prefix="tokenize")
        self._state: State = "starting"
        self._phase = "starting"  # in words; a thread that loads writes it, the probes read it
        self._served: ServedRun | None = None
        self._retired: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Load what the run's `final` pointers name and begin to serve. Raises RlhfError when that cannot be done."""
        run = await asyncio.to_thread(load_run, self.settings, on_phase=self._say)
        if self._state != "starting":
            return
        self._served = ServedRun(run, self.settings, self.metrics, self.tracer)
        self.metrics.serving(self._served.models)
        self._state = "ready"
        self._say("serving")
        if self.settings.watch:
            self._watching = asyncio.create_task(self._watch(run.directories))

    @contextmanager
    def held(self) -> Iterator[ServedRun]:
        """The models, for the time of a call. Raises ProblemError when the service takes no work."""
        if self._state in ("draining", "closed"):
            raise ProblemError(DRAINING, "the service is stopping and takes no new work")
        if self._served is None:
            raise ProblemError(NOT_READY, f"the service is not ready: {self._phase}")
        if trouble := self._served.trouble(stall_seconds=self.settings.stall_seconds):
            raise ProblemError(ENGINE_DEAD, trouble)
        with self._served.held() as served:
            yield served

    async def reload(self) -> ReloadAnswer:
        """Load what `final` names now beside what is served, and change over between two calls.

        Raises ProblemError when that fails; what was served before is served on.
        """
        async with self._reloading:
            with self.held() as before:
                if before.run.directories == await asyncio.to_thread(published, self.settings):
                    self.metrics.reloaded("unchanged")
                    return ReloadAnswer(changed=False, models=before.models)
                after = await self._load_beside()
                self._served = after
                self.metrics.serving(after.models)
            self._retire(before)
            self.metrics.reloaded("changed")
            logger.info("reloaded: %s", ", ".join(f"{model.id} step {model.step}" for model in after.models))
            return ReloadAnswer(changed=True, models=after.models)

    def begin_drain(self) -> None:
        """Take no new work from now on; what was accepted goes on."""
        if self._state != "closed":
            self._state = "draining"
            self._say("finishing what was accepted")

    async def drained(self) -> None:
        """Wait until all that was accepted has been answered."""
        if self._served is not None:
            await self._served.idle()
        await asyncio.gather(*self._retired, return_exceptions=True)

    async def close(self) -> None:
        """End all threads and tasks."""
        self._state = "closed"
        if self._watching is not None:
            self._watching.cancel()
        for task in self._retired:
            task.cancel()
        if self._served is not None:
            await self._served.close()
        self.tokenizing.shutdown(wait=False)
        self.tracer.close()

    def live(self) -> Health:
        """Whether the process is worth keeping; `failed` when a model's thread has died or hangs."""
        trouble = self._served and self._served.trouble(stall_seconds=self.settings.stall_seconds)
        return Health(status="failed", phase=trouble) if trouble else Health(status="ok", phase=self._phase)

    def started(self) -> Health:
        """Whether the first load is over, and how far it is."""
        return Health(status="starting" if self._served is None else "ok", phase=self._phase)

    def ready(self) -> Health:
        """Whether new work is taken."""
        if self._state in ("draining", "closed"):
            return Health(status="draining", phase=self._phase)
        return self.live() if self._served is not None else self.started()

    async def _load_beside(self) -> ServedRun:
        try:
            run = await asyncio.to_thread(load_run, self.settings, on_phase=self._say, beside=True)
        except NoRoom as error:
            raise self._kept(ProblemError(NO_ROOM, str(error))) from error
        except RlhfError as error:
            raise self._kept(ProblemError(RELOAD_FAILED, str(error))) from error
        except Exception as error:
            logger.exception("loading failed")
            detail = f"loading failed ({type(error).__name__}); the log has the details"
            raise self._kept(ProblemError(RELOAD_FAILED, detail)) from error
        finally:
            if self._state == "ready":
                self._say("serving")
        return ServedRun(run, self.settings, self.metrics, self.tracer)

    def _kept(self, problem: ProblemError) -> ProblemError:
        self.metrics.reloaded("failed")
        logger.error("not reloaded, what was served is served on: %s", problem.detail)
        return problem

    def _retire(self, before: ServedRun) -> None:
        """Close what was served once its last call is answered."""

        async def close_when_idle() -> None:
            await before.idle()
            await before.close()

        task = asyncio.create_task(close_when_idle())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def _watch(self, served: Mapping[str, Path]) -> None:
        # Not the run itself: this task lives as long as the service, and would keep its models in memory.
        watcher = FinalWatcher(
            lambda: published(self.settings),
            self.reload,
            served=served,
            every_seconds=self.settings.watch_seconds,
        )
        await watcher.run()

    def _say(self, words: str) -> None:
        self._phase = words
