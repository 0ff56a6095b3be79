"""Scoring beside other work: the same scores in the same order, its errors where they are waited for, no leftovers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.overlap import Ahead, one_behind, scoring_ahead
from rlhf.remote_scorer import RemoteScorer
from rlhf.scoring import Scorer
from rlhf.service_client import Patience, ServiceAway
from tests.fakes import tiny_reward_model

PATIENCE = 20.0
CHUNKS = [[[1, 2], [3]], [], [[4], [5], [6]]]


class Interrupted(Exception):
    """As the stage has it."""


class Service:
    """Stands in for the client of a service that scores a sequence by its sum, as soon as `open` is set."""

    url = "http://service"

    def __init__(self) -> None:
        self.open, self.asked = threading.Event(), threading.Event()
        self.away = 0
        self.threads: list[str] = []

    def post(self, path: str, body: dict[str, Any], patience: Patience) -> Any:
        self.threads.append(threading.current_thread().name)
        self.asked.set()
        while not self.open.is_set():
            if not patience.pause(0.01):
                raise ServiceAway("nobody waits any more")
        if self.away:
            self.away -= 1
            raise ServiceAway("away")
        return {"checksum": "c", "results": [{"score": float(sum(item["token_ids"]))} for item in body["items"]]}


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def remote(service: Service) -> RemoteScorer:
    return RemoteScorer(service, checksum="c", items_per_request=2, retry_seconds=PATIENCE)  # type: ignore[arg-type]


def nothing_to_heed() -> None:
    raise AssertionError("nothing was in vain")


def left_running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "score"))]


def test_a_service_is_asked_while_other_work_goes_on(service: Service, remote: RemoteScorer) -> None:
    with scoring_ahead(remote, heed=nothing_to_heed) as start:
        waits = [start(chunk) for chunk in CHUNKS]
        assert service.asked.wait(PATIENCE)  # and start has returned before there was an answer
        service.open.set()
        assert [wait().tolist() for wait in waits] == [[3.0, 3.0], [], [4.0, 5.0, 6.0]]
    assert threading.current_thread().name not in service.threads
    assert left_running() == []


def test_who_waits_for_a_service_that_is_away_heeds_in_its_own_thread(service: Service, remote: RemoteScorer) -> None:
    heeded: list[str] = []
    service.open.set()
    service.away = 2
    with scoring_ahead(remote, heed=lambda: heeded.append(threading.current_thread().name)) as start:
        wait = start([[7]])
        assert wait().tolist() == [7.0]
    assert heeded == [threading.current_thread().name] * 2


def test_processes_agree_as_often_whoever_is_done_first(
    service: Service, remote: RemoteScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The collective operations of one process, in order: a's wait, twice in vain, then b's.
    told: list[str] = []
    service.open.set()
    others_away = [True, True, False, False]

    def agreed(flag: bool) -> bool:
        told.append("agreed")
        return others_away.pop(0) or flag

    monkeypatch.setattr("rlhf.remote_scorer.agreed", agreed)
    with scoring_ahead(remote, heed=lambda: told.append("heed")) as start:
        first, second = start([[1]]), start([])
        assert told == []
        first()
        second()
    assert told == ["agreed", "heed", "agreed", "heed", "agreed", "agreed"]


def test_who_waits_behind_others_shows_life(
    service: Service, remote: RemoteScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.overlap.LOOK_SECONDS", 0.01)
    heeded: list[int] = []

    def heed() -> None:
        heeded.append(1)
        if len(heeded) == 3:
            service.open.set()  # after as many looks in vain, of a single request that tries on

    with scoring_ahead(remote, heed=heed) as start:
        waits = [start([[1]]), start([[2]])]
        assert [wait().tolist() for wait in reversed(waits)] == [[2.0], [1.0]]
    assert len(service.threads) == 2
    assert len(heeded) >= 3


def test_each_piece_of_work_is_finished_once_the_next_has_begun() -> None:
    told: list[str] = []

    def work() -> Iterator[Callable[[], int]]:
        for number in range(3):
            told.append(f"begin {number}")
            yield partial(finish, number)

    def finish(number: int) -> int:
        told.append(f"finish {number}")
        return number

    assert list(one_behind(work())) == [0, 1, 2]
    assert told == ["begin 0", "begin 1", "finish 0", "begin 2", "finish 1", "finish 2"]
    assert list(one_behind([])) == []


def test_asked_to_stop_it_leaves_nothing_behind(service: Service, remote: RemoteScorer) -> None:
    def interrupt() -> None:
        raise Interrupted

    with pytest.raises(Interrupted), scoring_ahead(remote, heed=interrupt) as start:
        waits = [start(chunk) for chunk in CHUNKS]
        assert service.asked.wait(PATIENCE)
        assert waits
        interrupt()  # while a request hangs, and others have not begun
    assert left_running() == []
    assert len(service.threads) == 1


def test_what_scoring_raises_is_raised_where_it_is_waited_for(service: Service) -> None:
    service.open.set()
    scorer = RemoteScorer(service, checksum="other", items_per_request=2, retry_seconds=0)  # type: ignore[arg-type]
    with scoring_ahead(scorer, heed=nothing_to_heed) as start:
        wait = start([[1]])
        with pytest.raises(ConfigError, match="scores with the reward model c"):
            wait()


def test_the_cores_that_generate_score_at_once() -> None:
    scorer = Scorer(tiny_reward_model(), batch_tokens=100)
    with scoring_ahead(scorer, heed=nothing_to_heed) as start:
        waits = [start(chunk) for chunk in CHUNKS]
        assert left_running() == []
    for wait, chunk in zip(waits, CHUNKS, strict=True):
        assert torch.equal(wait(), scorer.score(chunk))


def test_work_is_done_in_order_by_one_thread_and_what_has_not_begun_is_dropped() -> None:
    begun, release, done = threading.Event(), threading.Event(), list[int]()

    def work(number: int) -> Tensor:
        begun.set()
        assert release.wait(PATIENCE)
        done.append(number)
        return torch.tensor(number)

    with Ahead() as ahead:
        futures = [ahead.submit(partial(work, number)) for number in range(3)]
        release.set()
        assert [int(future.result()) for future in futures] == [0, 1, 2]
        release.clear()
        begun.clear()
        running, waiting = ahead.submit(partial(work, 3)), ahead.submit(partial(work, 4))
        assert begun.wait(PATIENCE)
        threading.Timer(0.05, release.set).start()
    assert ahead.ending()
    assert (int(running.result()), waiting.cancelled(), done) == (3, True, [0, 1, 2, 3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run it on a machine with one")
def test_a_gpu_scores_beside_other_work() -> None:
    scorer = Scorer(tiny_reward_model().to("cuda"), batch_tokens=100)
    with scoring_ahead(scorer, heed=nothing_to_heed) as start:
        waits = [start(chunk) for chunk in CHUNKS]
        found = [wait() for wait in waits]
    assert left_running() == []
    for scores_B, chunk in zip(found, CHUNKS, strict=True):
        torch.testing.assert_close(scores_B, scorer.score(chunk))
