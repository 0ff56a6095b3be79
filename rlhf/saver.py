"""Checkpoints written in the background: the copy to host memory stops the training, the writing does not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rlhf.checkpoint import StageDir
from rlhf.processes import is_first_process
from rlhf.telemetry import Metrics

logger = logging.getLogger(__name__)


class Saver:
    """Publishes one checkpoint at a time from a thread of its own; on all but the first process it does nothing.

    metrics are on the disk before a checkpoint that follows them is shown, so that a resumed run finds no gap.
    """

    def __init__(self, stage: StageDir, *, keep: int, metrics: Metrics | None = None) -> None:
        self._stage, self._keep, self._metrics = stage, keep, metrics
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; its failure is raised unless something else already is."""
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            logger.warning("the last checkpoint was not saved: %s", failure)

    def save(self, step: int, write: Callable[[Path], None], *, final: bool = False, best: bool = False) -> None:
        """Wait for the save before, then publish in the background what `write` puts into a directory, and prune.

        write must read nothing that the training goes on changing (`HostBuffers`). Raises what went wrong with the
        save before: StorageError, LeaseLost.
        """
        self.wait()
        if not is_first_process():
            return
        # Not a daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=self._publish, args=(step, write, final, best), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Until everything is published; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _publish(self, step: int, write: Callable[[Path], None], final: bool, best: bool) -> None:
        started = time.monotonic()
        try:
            if self._metrics is not None:
                self._metrics.sync()
            with self._stage.publish(step, final=final, best=best) as directory:
                write(directory)
            self._stage.prune(self._keep)
        except BaseException as error:
            self._failure = error
        else:
            logger.debug("written step=%d seconds=%.1f", step, time.monotonic() - started)


class HostBuffers:
    """Copies of tensors in host memory that is kept from save to save: fresh memory costs more time than the copy.

    A copy is good until the next one; `Saver.wait` before that, for who still reads it in the background.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Iterable[tuple[str, Tensor]], *, keep: bool = True) -> dict[str, Tensor]:
        """Named tensors as they are now, contiguous; from a GPU through pinned memory.

        They are taken one by one, so that a generator may make each when it is its turn. Without `keep` that is all.
        """
        copied, from_gpu = [], False
        for name, tensor in tensors:
            if not keep:
                continue
            source, buffer = tensor.detach(), self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(source, non_blocking=source.is_cuda)
            copied.append(name)
            from_gpu |= source.is_cuda
        if from_gpu:
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in copied}
