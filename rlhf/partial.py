"""What a stage has computed so far, on disk, so that a killed process loses one chunk.

A stage that only computes, without a training's state, works through its items chunk by chunk. Each chunk's results
are a line of a JSONL file, under a key that says what was computed from what; who continues reads them instead of
computing again. A chunk is computed whole or not at all and always in the same company, so that the results are the
same bits as those of a process that was never stopped.

Of many processes each computes some of the chunks, and is told what the others found; the first one writes. Which
process computes a chunk changes nothing, so that any number of them may continue what another number began.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from types import TracebackType
from typing import Any, TypeAlias

from rlhf.checkpoint import StageDir
from rlhf.processes import process_count, process_rank
from rlhf.runtime import agreed, from_all, from_first
from rlhf.stopping import StopSignal
from rlhf.storage import storage_errors
from rlhf.telemetry import append
from rlhf.watchdog import Watchdog

logger = logging.getLogger(__name__)

Compute: TypeAlias = Callable[[int, Sequence[Any]], Sequence[Any]]
"""Makes the results of a chunk, one an item, from the chunk's number and its items."""


class PartialResults:
    """Results by key, in `<stage>/<name>`; whoever opens them is the only one who writes.

    Values are what JSON holds; floats come back as the same bits, NaN and infinities included. A line that a killed
    process left half-written, or that the disk has changed, is passed over. Of many processes all hold all results,
    as long as each adds the same; the first has the file. Raises StorageError when the volume refuses, and LeaseLost
    when somebody else has taken the stage over.
    """

    def __init__(self, stage: StageDir, name: str) -> None:
        self._stage, self._path = stage, stage.path / name
        self._file: FileIO | None = None
        self._values = from_first(self._open)

    def _open(self) -> dict[str, Any]:
        with storage_errors(self._stage.path):
            values = _read(self._path.read_bytes() if self._path.is_file() else b"")
        # A new file: what is appended does not continue a torn line.
        self._file = self._stage.rewrite(self._path.name, "".join(_line(key, value) for key, value in values.items()))
        return values

    def __enter__(self) -> PartialResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: str, value: Any) -> None:
        """Remember a result; it outlives the first process once this has returned there."""
        if self._file is not None:
            self._stage.check()
            with storage_errors(self._stage.path):
                append(self._file, _line(key, value))
        self._values[key] = value

    def remove(self) -> None:
        """Delete the file, in the first process: what it was for is published."""
        assert self._file is not None, "the first process has the file"
        self._stage.check()
        self._file.close()
        with storage_errors(self._stage.path):
            self._path.unlink(missing_ok=True)


class ChunkedWork:
    """Works through items chunk by chunk, computing what is not there yet; a signal is heeded between two chunks.

    Many processes compute a round of chunks, one each, and then tell each other what they found. All of them have to
    come here with the same items.
    """

    def __init__(
        self, results: PartialResults, *, stop: StopSignal, watchdog: Watchdog, on_done: Callable[[int], None]
    ) -> None:
        """on_done hears after each round how many items are done, over all calls."""
        self._results, self._stop, self._watchdog, self._on_done = results, stop, watchdog, on_done
        self._done = 0

    def results(
        self,
        what: Mapping[str, Any],
        items: Sequence[Any],
        chunks: Sequence[Sequence[int]],
        load: Callable[[], Compute],
    ) -> list[Any]:
        """One result an item, in their order; chunks holds the indices of the items that are computed together.

        `what` names all that the results depend on beside the items. load is called, once, only in a process that
        has a missing chunk to compute. Raises StopRequested between two rounds after a signal to any process.
        """
        self._heed()
        keys = [_key(what, number, [items[index] for index in chunk]) for number, chunk in enumerate(chunks)]
        missing = [number for number, key in enumerate(keys) if key not in self._results]
        self._advance(sum(map(len, chunks)) - sum(len(chunks[number]) for number in missing))
        mine = process_rank()
        # Deferred for many processes alone: while one loads a model there is nothing to lose, and a signal ends it.
        with self._stop.together():
            compute = load() if mine < len(missing) else None
        with self._stop.deferred():
            for start in range(0, len(missing), process_count()):
                self._watchdog.beat()
                share = missing[start : start + process_count()]
                found: tuple[int, list[Any]] | None = None
                if compute is not None and mine < len(share):
                    found = share[mine], list(compute(share[mine], [items[index] for index in chunks[share[mine]]]))
                for number, values in filter(None, from_all(found)):
                    self._results.add(keys[number], values)
                self._advance(sum(len(chunks[number]) for number in share))
                self._heed()
        return self._in_order(items, chunks, keys)

    def _in_order(self, items: Sequence[Any], chunks: Sequence[Sequence[int]], keys: Sequence[str]) -> list[Any]:
        found: list[Any] = [None] * len(items)
        for key, chunk in zip(keys, chunks, strict=True):
            for index, value in zip(chunk, self._results[key], strict=True):
                found[index] = value
        return found

    def _advance(self, count: int) -> None:
        self._watchdog.beat()
        if count:
            self._done += count
            self._on_done(self._done)

    def _heed(self) -> None:
        if agreed(self._stop.requested):
            self._stop.request()
            self._stop.check()


def chunks_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in chunks of `size`, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _key(what: Mapping[str, Any], number: int, items: Sequence[Any]) -> str:
    return _digest(json.dumps({"what": dict(what), "chunk": number, "items": items}, sort_keys=True))


def _line(key: str, value: Any) -> str:
    return json.dumps({"key": key, "sha256": _checksum(key, value), "value": value}) + "\n"


def _checksum(key: str, value: Any) -> str:
    return _digest(f"{key} {json.dumps(value)}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(content: bytes) -> dict[str, Any]:
    values: dict[str, Any] = {}
    damaged = 0
    for line in content.split(b"\n"):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if entry["sha256"] != _checksum(entry["key"], entry["value"]):
                raise ValueError("the checksum differs")
            values[entry["key"]] = entry["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    if damaged:
        logger.warning("passed over %d damaged lines of what was computed before; they are computed again", damaged)
    return values
