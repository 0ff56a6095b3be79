"""Logs, progress and metrics: facts on stderr, bars on a terminal, numbers in metrics.jsonl."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from rlhf.checkpoint import StageDir
from rlhf.storage import storage_errors

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
PROGRESS_LOG_SECONDS = 15.0
BAR = "{desc:<18} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        """The facts of a record as JSON."""
        return json.dumps(self.facts(record))

    def facts(self, record: logging.LogRecord) -> dict[str, Any]:
        """Time, level, logger and message; a traceback when there is one."""
        fact: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fact["traceback"] = self.formatException(record.exc_info)
        return fact


class BarSafeHandler(logging.StreamHandler[Any]):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        tqdm.write(self.format(record), file=sys.stderr)


def configure_logging(*, debug: bool = False, quiet: bool = False, libraries: bool = True) -> None:
    """Human lines on a terminal, JSON otherwise, for our facts and libraries' warnings. Only entry points call this.

    quiet leaves out the facts, for all processes but the first; without libraries, none is imported for it.
    """
    handler = BarSafeHandler()
    human = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handler.setFormatter(human if sys.stderr.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rlhf").setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    logging.captureWarnings(True)
    # DeepSpeed still calls it by that name, at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.all_gather_into_tensor` is deprecated")
    if libraries:
        _redirect_transformers()


def _redirect_transformers() -> None:
    """Send what transformers logs through our handler, and spare us its bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


class Metrics:
    """Appends numbers to metrics.jsonl and, if asked, to TensorBoard.

    Lines at or after `start_step` that an earlier, killed process left are removed first, so that a
    continued run has neither gaps nor doubles. Disabled, as on all but the main process, it does nothing.
    """

    def __init__(self, stage: StageDir, *, tensorboard: bool, start_step: int = 0, enabled: bool = True) -> None:
        self._file, self._writer = None, None
        if not enabled:
            return
        self._path = stage.path / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] < start_step]
        self._file = stage.rewrite(self._path.name, "".join(json.dumps(row) + "\n" for row in kept))
        with storage_errors(stage.path):
            self._writer = _summary_writer(stage.path / "tensorboard", start_step) if tensorboard else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line; keys read `area/name`. A value that is not finite is written as null.

        Raises StorageError when the volume refuses.
        """
        if self._file is None:
            return
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        row |= {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
        with storage_errors(self._path.parent):
            append(self._file, json.dumps(row) + "\n")
            if self._writer is not None:
                for key, value in values.items():
                    self._writer.add_scalar(key, value, step)

    def sync(self) -> None:
        """Have every line on the disk before this returns."""
        if self._file is not None:
            with storage_errors(self._path.parent):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; TensorBoard's part is for show, so its last lines may fail to reach a volume that refuses them."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                logger.warning("TensorBoard's last events were not written: %s", error)


def append(file: FileIO, text: str) -> None:
    """Write all of it; a volume that takes a part only, as a full one does, is an OSError."""
    data = text.encode()
    written = file.write(data)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. What is torn or no line of ours is passed over."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


class Stopwatch:
    """Adds up the seconds spent in named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


class Progress:
    """A bar that names the stage and the time left, on a terminal, else a line now and then; progress.json always.

    Disabled, as on all but the main process, it shows and writes nothing.
    """

    def __init__(self, stage: StageDir, total: int, unit: str, *, done: int = 0, enabled: bool = True) -> None:
        self._enabled = enabled
        self._stage, self._total, self._unit = stage, total, unit
        self._first, self._done, self._started = done, done, time.monotonic()
        self._written = self._logged = -math.inf
        self._shown: dict[str, float] = {}
        self._bar_shown = enabled and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=stage.stage,
            unit=f" {unit}",
            disable=not self._bar_shown,
            dynamic_ncols=True,
            bar_format=BAR,
        )

    def __enter__(self) -> Progress:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, **shown: float) -> None:
        """State how many units are done, and numbers worth a look."""
        self._bar.update(done - self._done)
        self._done = done
        if shown:
            self._shown = shown
            self._bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()}, refresh=False)
        if time.monotonic() - self._written > PROGRESS_SECONDS:
            self._write()
        if time.monotonic() - self._logged > PROGRESS_LOG_SECONDS:
            self._log()

    def close(self) -> None:
        """Remove the bar, write and log the last state."""
        self._bar.close()
        self._write()
        self._log()

    def _write(self) -> None:
        if not self._enabled:
            return
        self._written = time.monotonic()
        state = self._state() | {"updated": round(time.time(), 1), "shown": self._shown}
        self._stage.write_text("progress.json", json.dumps(state))

    def _log(self) -> None:
        """The line that `cluster-status` reads from a pod's log."""
        if not self._enabled or self._bar_shown:
            return
        self._logged = time.monotonic()
        facts = {key: value for key, value in self._state().items() if value is not None}
        facts |= {key: f"{value:.4g}" for key, value in self._shown.items()}
        logger.info("progress %s", " ".join(f"{key}={value}" for key, value in facts.items()))

    def _state(self) -> dict[str, Any]:
        made, elapsed = self._done - self._first, time.monotonic() - self._started
        left = elapsed / made * (self._total - self._done) if made else None
        return {
            "stage": self._stage.stage,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "seconds_left": None if left is None else round(left, 1),
        }


def _summary_writer(directory: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start_step or None)
