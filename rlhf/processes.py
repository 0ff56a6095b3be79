"""This process among those that share a stage, as torchrun's environment variables tell it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def process_count() -> int:
    """How many processes share the stage, over all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return process_rank() == 0


def die_with(parent: int) -> None:
    """Have the kernel kill this process once the process `parent`, which started it, is gone (Linux; else nothing)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)
