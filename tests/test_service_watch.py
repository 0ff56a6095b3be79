"""The watcher of `final`: one call a change, none before it has settled, and nothing ends it but being cancelled."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.problems import NO_ROOM, ProblemError
from app.published import published
from app.settings import Settings
from app.watch import FinalWatcher, Names
from rlhf.errors import PrerequisiteError, RlhfError
from tests.served_run import publish_policy, publish_reward_model, served_run

OLD = {"ppo": Path("/runs/r/ppo/step-1"), "reward": Path("/runs/r/reward/step-1")}
HALF = {**OLD, "ppo": Path("/runs/r/ppo/step-2")}
NEW = {**HALF, "reward": Path("/runs/r/reward/step-2")}


NO_ROOM_FOR_TWO = RlhfError("no room")


class EndOfScript(Exception):
    """All looks have been taken."""


def calls_of(script: list[Names | Exception], *, failures: int = 0, failure: Exception = NO_ROOM_FOR_TWO) -> list[int]:
    """After how many looks the callback was called, whose first `failures` calls fail."""
    looks, calls = 0, []

    def look() -> Names:
        nonlocal looks
        answer = script[looks]
        looks += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def on_change() -> None:
        calls.append(looks)
        if len(calls) <= failures:
            raise failure

    async def pause(seconds: float) -> None:
        assert seconds == 10
        if looks == len(script):
            raise EndOfScript

    watcher = FinalWatcher(look, on_change, served=OLD, every_seconds=10, pause=pause)
    with pytest.raises(EndOfScript):
        asyncio.run(watcher.run())
    return calls


def test_nothing_new_calls_nothing() -> None:
    assert calls_of([OLD, OLD, OLD]) == []


def test_a_change_is_called_once_and_only_when_it_has_stayed_for_another_look() -> None:
    assert calls_of([OLD, NEW, NEW, NEW, NEW]) == [3]


def test_two_models_that_change_shortly_after_each_other_are_one_change() -> None:
    assert calls_of([HALF, NEW, NEW, NEW]) == [3]


def test_a_change_that_is_taken_back_calls_nothing() -> None:
    assert calls_of([NEW, OLD, OLD, OLD]) == []


def test_each_change_is_called() -> None:
    assert calls_of([HALF, HALF, NEW, NEW, OLD, OLD, OLD]) == [2, 4, 6]


def test_a_failure_is_tried_again_after_a_growing_pause() -> None:
    # Called at look 2; then one look is passed over, then two, then four.
    assert calls_of([NEW] * 16, failures=3) == [2, 4, 7, 12]


def test_a_failure_is_tried_again_as_soon_as_the_names_change() -> None:
    assert calls_of([HALF] * 5 + [NEW] * 3, failures=2) == [2, 4, 7]


def test_names_that_cannot_be_read_change_nothing_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    gone, stale = PrerequisiteError("ppo/final does not exist"), OSError(116, "Stale file handle")
    with caplog.at_level(logging.WARNING):
        assert calls_of([NEW, gone, gone, stale, NEW, NEW]) == [5]
    assert [record.getMessage() for record in caplog.records] == [
        "cannot see what final names: ppo/final does not exist",
        "cannot see what final names: [Errno 116] Stale file handle",
    ]


@pytest.mark.parametrize(
    ("failure", "traceback"),
    [(RlhfError("no room"), False), (ProblemError(NO_ROOM, "no room"), False), (KeyError("no room"), True)],
)
def test_a_failure_is_told_with_its_reason(
    failure: Exception, traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal is one line; what nobody foresaw comes with its traceback."""
    calls_of([NEW, NEW], failures=1, failure=failure)
    assert "next try in 2 looks: " in caplog.text
    assert "no room" in caplog.text
    assert ("Traceback" in caplog.text) == traceback


def test_a_volume_that_hangs_holds_up_neither_the_loop_nor_the_end() -> None:
    hangs, released = threading.Event(), threading.Event()
    thread: list[threading.Thread] = []

    def look() -> Names:
        thread.append(threading.current_thread())
        hangs.set()
        released.wait()
        return OLD

    async def on_change() -> None:
        raise AssertionError("nothing has changed")

    async def main() -> None:
        watcher = FinalWatcher(look, on_change, served=OLD, every_seconds=0)
        task = asyncio.create_task(watcher.run())
        while not hangs.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(thread) == 1
    assert thread[0].is_alive()
    assert thread[0].daemon
    released.set()
    thread[0].join(timeout=10)
    assert not thread[0].is_alive()


def test_a_run_that_publishes_is_noticed(tmp_path: Path) -> None:
    run_dir = served_run(tmp_path)
    settings = Settings(run_dir=run_dir)
    steps: list[Callable[[], Path]] = [
        lambda: publish_policy(run_dir, "ppo", step=20, seed=8),
        lambda: publish_reward_model(run_dir, step=20, seed=8),
    ]
    noticed: list[Names] = []

    async def on_change() -> None:
        noticed.append(published(settings))

    async def pause(_: float) -> None:
        if noticed:
            raise EndOfScript
        if steps:
            steps.pop(0)()

    watcher = FinalWatcher(
        lambda: published(settings), on_change, served=published(settings), every_seconds=1, pause=pause
    )
    with pytest.raises(EndOfScript):
        asyncio.run(watcher.run())
    steps_noticed = {name: directory.name for name, directory in noticed[0].items()}
    assert steps_noticed == {"ppo": "step-00000020", "sft": "step-00000003", "reward": "step-00000020"}
