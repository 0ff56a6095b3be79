"""Which device a model lives on, in which precision, and how much memory is free there."""

from __future__ import annotations

import psutil
import torch

from rlhf import cgroups
from rlhf.errors import ConfigError
from rlhf.runtime import torch_dtype


def choose_device(setting: str, value: str) -> torch.device:
    """The device that a setting names, CUDA with its number, so that one device has one name.

    value is `auto`, `cpu`, `cuda` or `cuda:N`. Raises ConfigError naming the setting where it is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if value == "auto":
        value = "cuda" if count else "cpu"
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{setting}={value} is no device; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    number = device.index or 0
    if number >= count:
        visible = ", ".join(f"cuda:{index}" for index in range(count)) or "no CUDA device"
        raise ConfigError(f"{setting}={value} is not there: visible is {visible}; use auto, cpu or one of these")
    return torch.device("cuda", number)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What `APP_PRECISION` means on a device: `auto` is float32 on the CPU and bfloat16 on CUDA."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch_dtype(precision)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on a device.

    On CUDA what torch holds back for itself counts as free; on the CPU the smaller of what the machine has
    and what the container's limit leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available: int = psutil.virtual_memory().available
    left = cgroups.memory_room(cgroups.CGROUPS, cgroups.MEMBERSHIP)
    return available if left is None else min(available, left)
