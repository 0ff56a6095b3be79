"""The machine: seeds, device, precision, threads, and the processes that share a stage."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch

from rlhf import cgroups
from rlhf.config import RuntimeConfig
from rlhf.errors import ConfigError, StopRequested
from rlhf.processes import is_first_process, process_count

logger = logging.getLogger(__name__)

T = TypeVar("T")

ACCELERATE_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}

WAIT_AT_MOST = timedelta(minutes=30)
"""Longer than the slowest thing that one process does while the others wait: saving to a slow volume."""


def prepare_runtime(config: RuntimeConfig, *, seed: int) -> torch.device:
    """Set threads, determinism and seeds; return the device. Call it once, before any tensor."""
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), _cores()))
    # cuBLAS is deterministic only with a fixed workspace; it must be named before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_everything(seed)
    return choose_device(config)


def _cores() -> int:
    """What a container may use; torch counts the machine's cores, and more threads than a quota wait, spinning."""
    return cgroups.usable_cores(cgroups.CGROUPS, cgroups.MEMBERSHIP)


def announce_device() -> None:
    """Tell DeepSpeed that there is no GPU; left to find out, it prints a warning on every start."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator(seed: int, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream of its own for (seed, parts...), so that no step depends on what ran before it."""
    mixed = np.random.SeedSequence([seed, *parts]).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(mixed >> np.uint64(1)))


def choose_device(config: RuntimeConfig) -> torch.device:
    """The device that the configuration asks for; ConfigError where it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device=cuda, but no CUDA device is visible; use auto or cpu")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def torch_dtype(precision: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as torch names it."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


@contextmanager
def all_processes(config: RuntimeConfig) -> Iterator[None]:
    """Join the processes that share the stage, until the block ends; alone there is nothing to join.

    A failure leaves at once, without taking leave of processes that may be gone.
    """
    if process_count() == 1:
        yield
        if torch.distributed.is_initialized():  # a group of one, made for DeepSpeed
            torch.distributed.destroy_process_group()
        return
    gpu = None
    if choose_device(config).type == "cuda":
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
    torch.distributed.init_process_group("nccl" if gpu else "gloo", timeout=WAIT_AT_MOST, device_id=gpu)
    logger.info("joined processes=%d backend=%s", process_count(), torch.distributed.get_backend())
    try:
        yield
    except StopRequested:
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def from_first(find: Callable[[], T]) -> T:
    """What the first process finds, on all: nodes may not see the same of a shared volume just then.

    What it raises is raised on all.
    """
    if not torch.distributed.is_initialized():
        return find()
    told: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_first_process():
        try:
            told = [(find(), None)]
        except Exception as error:
            told = [(None, error)]
    torch.distributed.broadcast_object_list(told, src=0)
    found, failure = told[0]
    if failure is not None:
        raise failure
    return found  # type: ignore[return-value]


def from_all(mine: T) -> list[T]:
    """What each process has, by rank, on all; every process has to call it."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyones: list[T | None] = [None] * process_count()
    torch.distributed.all_gather_object(everyones, mine)
    return everyones  # type: ignore[return-value]


def agreed(flag: bool) -> bool:
    """Whether the flag is up on any process; the answer is the same on all."""
    if not torch.distributed.is_initialized():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    raised = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return bool(raised.item())


def wait_for_all() -> None:
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
