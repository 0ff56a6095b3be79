"""`python -m app` with handles for tests: `python -m tests.hooked_app FOLDER`.

Files in the folder say what is to happen, for as long as they are there:

    loading   names a phase of loading, in which the service stays
    hold      no policy takes a step
    die       the next step of a policy raises

SIGUSR1 logs what lives in the process: asyncio's tasks, the runs that are held in memory, and how many objects.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import app.__main__
import app.loading
import app.service
from app.loading import LoadedRun
from app.service import Service
from app.settings import Settings
from rlhf.slots import NextToken, SlotBatch

logger = logging.getLogger("app.hooks")


def hook_loading(folder: Path) -> None:
    """Let `loading` hold up the load, as a slow volume would."""
    load_run = app.service.load_run

    def slow_load_run(settings: Settings, *, on_phase: Callable[[str], None], beside: bool = False) -> LoadedRun:
        def slow_phase(words: str) -> None:
            on_phase(words)
            while _text(folder / "loading") == words:
                time.sleep(0.005)

        return load_run(settings, on_phase=slow_phase, beside=beside)

    app.service.load_run = slow_load_run


def hook_steps(folder: Path) -> None:
    """Let `hold` hold up each step, and `die` end the thread that takes it."""
    step = SlotBatch.step

    def slow_step(batch: SlotBatch) -> list[NextToken]:
        while (folder / "hold").exists():
            time.sleep(0.005)
        if (folder / "die").exists():
            raise RuntimeError("the device is gone")
        return step(batch)

    SlotBatch.step = slow_step  # type: ignore[method-assign, assignment]


def hook_report() -> None:
    """Let SIGUSR1 log what lives; the signal can be sent once the service has begun to load."""
    load = Service.load

    async def load_and_listen(service: Service) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _report)
        await load(service)

    Service.load = load_and_listen  # type: ignore[method-assign, assignment]


def _report() -> None:
    gc.collect()
    objects = gc.get_objects()
    runs = sum(type(thing) is LoadedRun for thing in objects)
    tasks = sorted(str(task.get_coro().__qualname__) for task in asyncio.all_tasks())  # type: ignore[union-attr]
    logger.info("report", extra={"facts": {"tasks": tasks, "runs": runs, "objects": len(objects)}})


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def main() -> int:
    """Serve as `python -m app` does."""
    folder = Path(sys.argv[1])
    hook_loading(folder)
    hook_steps(folder)
    hook_report()
    return app.__main__.main([])


if __name__ == "__main__":
    sys.exit(main())
