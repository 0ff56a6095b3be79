"""SIGTERM and SIGINT: at once where nothing needs saving, at the step's end in a loop, and only the first counts."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from rlhf.errors import StopRequested
from rlhf.stopping import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopSignal()
    stop.install()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_loop_a_signal_is_remembered_and_a_second_changes_nothing(
    stop: StopSignal, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rlhf")
    with stop.deferred():
        stop.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(StopRequested, match="run the same command again") as caught:
            stop.check()
    assert caught.value.exit_code == 75
    assert not stop.interrupted
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    assert [record.getMessage() for record in caplog.records] == [
        f"{number.name} received: finishing the step and saving"
    ]


@pytest.mark.parametrize("number", SIGNALS)
def test_while_something_is_loaded_the_first_signal_ends_it_and_a_second_does_not_disturb_that(
    stop: StopSignal, number: signal.Signals
) -> None:
    with pytest.raises(KeyboardInterrupt):
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("a library that catches Exception would have swallowed it")
    assert stop.interrupted
    os.kill(os.getpid(), number)


def test_after_the_loop_signals_end_at_once_again(stop: StopSignal) -> None:
    with stop.deferred():
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_who_loses_the_lease_is_asked_to_stop(stop: StopSignal) -> None:
    stop.request()
    with pytest.raises(StopRequested):
        stop.check()


def test_a_block_within_a_deferred_one_ends_without_ending_the_deferral(stop: StopSignal) -> None:
    with stop.deferred():
        with stop.deferred():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.requested, stop.interrupted) == (True, False)


def test_many_processes_leave_together_and_one_leaves_at_once(
    stop: StopSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stop.together():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.requested, stop.interrupted) == (True, False)
    alone = StopSignal()
    alone.install()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(KeyboardInterrupt), alone.together():
        os.kill(os.getpid(), signal.SIGTERM)
