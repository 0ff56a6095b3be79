"""What a stage has computed so far, on disk, so that a killed process loses one chunk.

A stage that only computes, without a training's state, works through its items chunk by chunk. Each chunk's results
are a line of a JSONL file, under a key that says what was computed from what; who continues reads them instead of
computing again. A chunk is computed whole or not at all and always in the same company, so that the results are the
same bits as those of a process that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from rlhf.checkpoint import StageDir
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
    process left half-written, or that the disk has changed, is passed over. Raises StorageError when the volume
    refuses, and LeaseLost when somebody else has taken the stage over.
    """

    def __init__(self, stage: StageDir, name: str) -> None:
        self._stage, self._path = stage, stage.path / name
        with storage_errors(stage.path):
            self._values = _read(self._path.read_bytes() if self._path.is_file() else b"")
        # A new file: what is appended does not continue a torn line.
        self._file = stage.rewrite(name, "".join(_line(key, value) for key, value in self._values.items()))

    def __enter__(self) -> PartialResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: str, value: Any) -> None:
        """Remember a result; it outlives this process once this returns."""
        self._stage.check()
        with storage_errors(self._stage.path):
            append(self._file, _line(key, value))
        self._values[key] = value

    def remove(self) -> None:
        """Delete the file: what it was for is published."""
        self._stage.check()
        self._file.close()
        with storage_errors(self._stage.path):
            self._path.unlink(missing_ok=True)


class ChunkedWork:
    """Works through items chunk by chunk, computing what is not there yet; a signal is heeded between two chunks."""

    def __init__(
        self, results: PartialResults, *, stop: StopSignal, watchdog: Watchdog, on_done: Callable[[int], None]
    ) -> None:
        """on_done hears after each chunk how many items are done, over all calls."""
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

        `what` names all that the results depend on beside the items. load is called, once, only when a chunk is
        missing. Raises StopRequested between two chunks after a signal.
        """
        self._stop.check()
        keys = [_key(what, number, [items[index] for index in chunk]) for number, chunk in enumerate(chunks)]
        # Not deferred: while a model is loaded there is nothing to lose, and a signal ends the process at once.
        compute = None if all(key in self._results for key in keys) else load()
        found: list[Any] = [None] * len(items)
        with self._stop.deferred():
            for number, (key, chunk) in enumerate(zip(keys, chunks, strict=True)):
                self._watchdog.beat()
                if compute is not None and key not in self._results:
                    self._results.add(key, list(compute(number, [items[index] for index in chunk])))
                for index, value in zip(chunk, self._results[key], strict=True):
                    found[index] = value
                self._done += len(chunk)
                self._on_done(self._done)
                self._stop.check()
        return found


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
