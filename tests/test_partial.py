"""What a stage has computed so far: found again bit for bit, or computed again, and never by two."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoint import StageDir
from rlhf.errors import StopRequested, StorageError
from rlhf.lease import LeaseLost, take_lease
from rlhf.partial import ChunkedWork, PartialResults, chunks_by_length
from rlhf.stopping import StopSignal
from rlhf.watchdog import Watchdog

NAME = "results.partial.jsonl"


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    stage = StageDir(tmp_path / "run", "evaluate")
    stage.path.mkdir(parents=True)
    return stage


def store(stage: StageDir, values: dict[str, Any]) -> Path:
    with PartialResults(stage, NAME) as results:
        for key, value in values.items():
            results.add(key, value)
    return stage.path / NAME


def stored(stage: StageDir) -> dict[str, Any]:
    with PartialResults(stage, NAME) as results:
        return {key: results[key] for key in ("a", "b", "c", "d") if key in results}


def test_floats_come_back_as_the_same_bits(stage: StageDir) -> None:
    values = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 2 / 3, math.inf, -math.inf, math.nan]
    store(stage, {"a": values, "b": [[1, 2], True, None, "ü\n"]})
    found = stored(stage)
    assert [value.hex() for value in found["a"]] == [value.hex() for value in values]
    assert found["b"] == [[1, 2], True, None, "ü\n"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],  # torn
        lambda line: b"",
        lambda line: line.replace(b"2.5", b"2.6"),  # still JSON
        lambda line: line.replace(b'"b"', b'"z"'),
        lambda line: b"\xff\xfe" + line,
        lambda line: b"[1, 2]",
        lambda line: b"[" * 100_000,
        lambda line: b'{"key": ["b"], "sha256": "", "value": 1}',
    ],
)
def test_a_damaged_line_is_passed_over_and_gone(stage: StageDir, damage: Callable[[bytes], bytes]) -> None:
    path = store(stage, {"a": 1.5, "b": 2.5, "c": 3.5})
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage(lines[1]), lines[2]]) + b"\n")
    assert stored(stage) == {"a": 1.5, "c": 3.5}
    assert [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()] == ["a", "c"]


def test_what_follows_a_torn_last_line_is_whole(stage: StageDir) -> None:
    path = store(stage, {"a": 1.5, "b": 2.5})
    path.write_bytes(path.read_bytes()[:-20])
    store(stage, {"c": 3.5})
    assert stored(stage) == {"a": 1.5, "c": 3.5}


def test_who_opens_them_later_is_the_only_writer(stage: StageDir) -> None:
    with PartialResults(stage, NAME) as early:
        early.add("a", 1)
        with PartialResults(stage, NAME) as late:
            late.add("b", 2)
            early.add("c", 3)  # from before the later one began: seen by nobody
    assert stored(stage) == {"a": 1, "b": 2}


def test_who_lost_the_stage_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run" / "evaluate"
    lease = take_lease(path, seconds=30)
    with PartialResults(StageDir(tmp_path / "run", "evaluate", lease=lease), NAME) as results:
        results.add("a", 1)
        lease.room.rename(path / ".fenced-by-another")
        with pytest.raises(LeaseLost):
            results.add("b", 2)
        with pytest.raises(LeaseLost):
            results.remove()
    lease.release()
    assert stored(StageDir(tmp_path / "run", "evaluate")) == {"a": 1}


def test_who_lost_the_stage_cannot_open_them(tmp_path: Path) -> None:
    path = tmp_path / "run" / "evaluate"
    lease = take_lease(path, seconds=30)
    lease.room.rename(path / ".fenced-by-another")
    with pytest.raises(LeaseLost):
        PartialResults(StageDir(tmp_path / "run", "evaluate", lease=lease), NAME)
    lease.release()
    assert not (path / NAME).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_the_volume_refuses_is_one_line(stage: StageDir, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(PartialResults):
        """A file that takes ten bytes, then nothing."""

        def __init__(self, stage: StageDir, name: str) -> None:
            super().__init__(stage, name)
            self._file.close()
            self._file = self  # type: ignore[assignment]
            self.taken = 0

        def write(self, line: memoryview) -> int:
            if self.taken:
                raise OSError(number, os.strerror(number))
            self.taken += 10
            (stage.path / NAME).write_bytes(bytes(line[:10]))
            return 10

        def close(self) -> None:
            pass

    with Refusing(stage, NAME) as results, pytest.raises(StorageError, match="cannot write below"):
        results.add("a", 1)
    assert stored(stage) == {}
    assert store(stage, {"a": 1}).read_bytes().count(b"\n") == 1


def test_a_truly_full_disk(small_volume: Callable[[str], Path]) -> None:
    stage = StageDir(small_volume("256k") / "run", "evaluate")
    stage.path.mkdir(parents=True)
    with PartialResults(stage, NAME) as results:
        results.add("a", 1)
        with pytest.raises(StorageError, match="the volume is full"):
            results.add("b", "x" * 1_000_000)
    content = (stage.path / NAME).read_bytes()
    assert content.count(b"\n") == 1
    (stage.path / NAME).write_bytes(content.splitlines(keepends=True)[0])  # room to go on
    assert stored(stage) == {"a": 1}


class Doubling:
    """Work that notes which chunks it computed, and how often it was loaded."""

    def __init__(self) -> None:
        self.loaded = 0
        self.computed: list[tuple[int, list[int]]] = []

    def load(self) -> Callable[[int, Sequence[int]], list[int]]:
        self.loaded += 1
        return self.compute

    def compute(self, number: int, items: Sequence[int]) -> list[int]:
        self.computed.append((number, list(items)))
        return [2 * item for item in items]


CHUNKS = [[4, 0], [1, 2], [3]]
ITEMS = [10, 11, 12, 13, 14]


def work(
    stage: StageDir,
    doubling: Doubling,
    *,
    stop: StopSignal | None = None,
    what: dict[str, Any] | None = None,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[int]:
    with Watchdog(60) as watchdog, PartialResults(stage, NAME) as results:
        chunked = ChunkedWork(results, stop=stop or StopSignal(), watchdog=watchdog, on_done=on_done)
        return chunked.results(what or {"model": "m"}, ITEMS, CHUNKS, doubling.load)


def test_results_stand_in_the_order_of_the_items(stage: StageDir) -> None:
    doubling, seen = Doubling(), []
    assert work(stage, doubling, on_done=seen.append) == [20, 22, 24, 26, 28]
    assert doubling.computed == [(0, [14, 10]), (1, [11, 12]), (2, [13])]
    assert seen == [2, 4, 5]


def test_what_is_there_is_neither_computed_nor_loaded_again(stage: StageDir) -> None:
    work(stage, Doubling())
    again = Doubling()
    assert work(stage, again) == [20, 22, 24, 26, 28]
    assert (again.loaded, again.computed) == (0, [])


def test_another_model_is_other_work(stage: StageDir) -> None:
    work(stage, Doubling())
    other = Doubling()
    work(stage, other, what={"model": "n"})
    assert len(other.computed) == 3


def test_a_signal_is_heeded_between_two_chunks_and_the_rest_done_later(stage: StageDir) -> None:
    stop, first, second = StopSignal(), Doubling(), Doubling()
    with pytest.raises(StopRequested):
        work(stage, first, stop=stop, on_done=lambda done: stop.request())
    assert len(first.computed) == 1
    assert work(stage, second) == [20, 22, 24, 26, 28]
    assert second.computed == [(1, [11, 12]), (2, [13])]


def test_a_signal_that_came_before_loads_nothing(stage: StageDir) -> None:
    stop, doubling = StopSignal(), Doubling()
    stop.request()
    with pytest.raises(StopRequested):
        work(stage, doubling, stop=stop)
    assert doubling.loaded == 0


def test_loading_may_be_interrupted_and_a_chunk_may_not(stage: StageDir) -> None:
    deferred: list[bool] = []

    class Watching(Doubling):
        def load(self) -> Callable[[int, Sequence[int]], list[int]]:
            deferred.append(stop._deferred)
            return super().load()

        def compute(self, number: int, items: Sequence[int]) -> list[int]:
            deferred.append(stop._deferred)
            return super().compute(number, items)

    stop = StopSignal()
    work(stage, Watching(), stop=stop)
    assert deferred == [False, True, True, True]


def test_equal_chunks_are_told_apart_by_their_number(stage: StageDir) -> None:
    doubling = Doubling()
    with Watchdog(60) as watchdog, PartialResults(stage, NAME) as results:
        chunked = ChunkedWork(results, stop=StopSignal(), watchdog=watchdog, on_done=lambda done: None)
        chunked.results({}, [7, 7], [[0], [1]], doubling.load)
    assert doubling.computed == [(0, [7]), (1, [7])]


class Ranks:
    """Processes that share a stage, played by threads: what they tell each other goes through here.

    One that ends with an exception breaks the others' connections.
    """

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._here = threading.local()
        self._meeting, self._told = threading.Barrier(count), list[Any]([None] * count)
        self._count = count
        monkeypatch.setattr("rlhf.partial.process_count", lambda: count)
        monkeypatch.setattr("rlhf.partial.process_rank", lambda: self._here.rank)
        monkeypatch.setattr("rlhf.partial.from_all", self.exchange)
        monkeypatch.setattr("rlhf.partial.agreed", lambda flag: any(self.exchange(flag)))
        monkeypatch.setattr(
            "rlhf.partial.from_first", lambda find: self.exchange(find() if not self._here.rank else 0)[0]
        )

    def exchange(self, mine: Any) -> list[Any]:
        self._told[self._here.rank] = mine
        self._meeting.wait(timeout=20)
        told = list(self._told)
        with suppress(threading.BrokenBarrierError):  # who has heard all may end before the others have left
            self._meeting.wait(timeout=20)
        return told

    def run(self, play: Callable[[int], Any]) -> list[Any]:
        """What each of them gives, or the exception that ended it."""

        def one(rank: int) -> Any:
            self._here.rank = rank
            try:
                return play(rank)
            except BaseException as error:
                self._meeting.abort()
                return error

        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(one, range(self._count)))


LONGER = [[number] for number in range(5)]
"""Five chunks of one item each."""


def shared(stage: StageDir, works: Sequence[Doubling], stop: StopSignal, chunks: list[list[int]] = LONGER) -> Any:
    """What a rank does, `stop` being the signal of rank 1; the partial file is the first's alone."""

    def play(rank: int) -> list[int]:
        heard = stop if rank == 1 else StopSignal()
        with Watchdog(60) as watchdog, PartialResults(stage, NAME) as results:
            assert (results._file is None) == (rank > 0)
            work = ChunkedWork(results, stop=heard, watchdog=watchdog, on_done=lambda done: None)
            return work.results({}, ITEMS[: len(chunks)], chunks, works[rank].load)

    return play


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_processes_take_turns_and_each_has_all_results(
    count: int, stage: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [Doubling() for _ in range(count)]
    found = Ranks(count, monkeypatch).run(shared(stage, works, StopSignal()))
    assert found == [[20, 22, 24, 26, 28]] * count
    computed = [[number for number, _ in work.computed] for work in works]
    assert computed == [list(range(rank, 5, count)) for rank in range(count)]
    assert [work.loaded for work in works] == [1] * count
    lines = [json.loads(line)["value"] for line in (stage.path / NAME).read_text(encoding="utf-8").splitlines()]
    assert lines == [[20], [22], [24], [26], [28]]


@pytest.mark.parametrize("chunks", [[], [[0]], [[0], [1]]])
def test_who_has_no_chunk_to_compute_loads_nothing_and_waits_for_nobody(
    chunks: list[list[int]], stage: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [Doubling() for _ in range(3)]
    found = Ranks(3, monkeypatch).run(shared(stage, works, StopSignal(), chunks))
    assert found == [[20, 22][: len(chunks)]] * 3
    assert [work.loaded for work in works] == [1] * len(chunks) + [0] * (3 - len(chunks))


def test_a_signal_to_one_process_stops_all_and_another_number_of_them_continues(
    stage: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopSignal()

    class Stopped(Doubling):
        def compute(self, number: int, items: Sequence[int]) -> list[int]:
            stop.request()
            return super().compute(number, items)

    works = [Doubling(), Stopped()]
    found = Ranks(2, monkeypatch).run(shared(stage, works, stop))
    assert [type(one) for one in found] == [StopRequested, StopRequested]
    assert [work.computed for work in works] == [[(0, [10])], [(1, [11])]]
    others = [Doubling() for _ in range(3)]
    assert Ranks(3, monkeypatch).run(shared(stage, others, StopSignal())) == [[20, 22, 24, 26, 28]] * 3
    assert [work.computed for work in others] == [[(2, [12])], [(3, [13])], [(4, [14])]]


def test_who_fails_takes_the_others_along_and_what_was_told_is_kept(
    stage: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Doubling):
        def compute(self, number: int, items: Sequence[int]) -> list[int]:
            if number == 3:
                raise ValueError("out of memory")
            return super().compute(number, items)

    found = Ranks(2, monkeypatch).run(shared(stage, [Doubling(), Failing()], StopSignal()))
    assert [type(one) for one in found] == [threading.BrokenBarrierError, ValueError]
    alone = Doubling()
    assert Ranks(1, monkeypatch).run(shared(stage, [alone], StopSignal())) == [[20, 22, 24, 26, 28]]
    assert [number for number, _ in alone.computed] == [2, 3, 4]


def test_chunks_begin_with_the_longest() -> None:
    assert chunks_by_length([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]


def test_remove_leaves_nothing(stage: StageDir) -> None:
    with PartialResults(stage, NAME) as results:
        results.add("a", 1)
        results.remove()
    assert list(stage.path.iterdir()) == []
