"""What this machine can do, measured: products of matrices, memory, and the time of a step that does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.benchmarks.limits import Machine


@dataclass(frozen=True)
class Measured:
    """A device: FLOPs a second in large products, bytes a second read and copied, seconds of the smallest step."""

    name: str
    dtype: str
    threads: int
    flops: float
    read: float
    copy: float
    step_seconds: float

    @property
    def machine(self) -> Machine:
        """The limit that work is held against; the quicker way to move bytes counts."""
        return Machine(flops=self.flops, bandwidth=max(self.read, self.copy))


@dataclass(frozen=True)
class Clock:
    """Seconds of work on a device.

    On the CPU with one thread they are the process's CPU time, to which other programs add nothing; otherwise the
    wall's, after the device has finished.
    """

    device: torch.device

    def __call__(self) -> float:
        """Now, when all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def best(self, work: Callable[[], object], *, repeats: int) -> float:
        """Seconds of the quickest of so many times, after one that does not count."""
        work()
        found = []
        for _ in range(repeats):
            started = self()
            work()
            found.append(self() - started)
        return min(found)


def measure_machine(
    device: torch.device, dtype: torch.dtype, *, size: int | None = None, megabytes: int | None = None, repeats: int = 5
) -> Measured:
    """size is of the square matrices; megabytes are of what is read or copied, far more than caches hold."""
    on_gpu = device.type == "cuda"
    size = size or (8192 if on_gpu else 2048)
    megabytes = megabytes or (4096 if on_gpu else 256)
    clock = Clock(device)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = clock.best(lambda: torch.matmul(left, right, out=product), repeats=repeats)
    source = torch.ones(megabytes * 2**18, device=device)
    target, number = torch.ones_like(source), torch.zeros((), device=device)
    bytes_ = source.numel() * source.element_size()
    read = bytes_ / clock.best(lambda: torch.sum(source, dim=0, out=number), repeats=repeats)
    copy = 2 * bytes_ / clock.best(lambda: target.copy_(source), repeats=repeats)
    step = clock.best(lambda: [number.add_(1.0) for _ in range(1000)], repeats=repeats) / 1000
    return Measured(
        name=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        flops=2 * size**3 / seconds,
        read=read,
        copy=copy,
        step_seconds=step,
    )
