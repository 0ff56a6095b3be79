"""Which device a model lives on, in which precision, and how much memory is free there."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from rlhf.errors import ConfigError
from rlhf.runtime import torch_dtype

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


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
    left = cgroup_room(CGROUPS, MEMBERSHIP)
    return available if left is None else min(available, left)


def cgroup_room(root: Path, membership: Path) -> int | None:
    """Bytes left below the tightest memory limit of this process's control groups, version 1 or 2.

    membership is laid out as /proc/self/cgroup. None where no group sets a limit.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return None
    rooms: list[int | None] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            rooms += _rooms(root, path, limit="memory.max", used="memory.current", prefix="")
        elif "memory" in controllers.split(","):
            names = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "prefix": "total_"}
            rooms += _rooms(root / "memory", path, **names)
    return min((room for room in rooms if room is not None), default=None)


def _rooms(mount: Path, path: str, *, limit: str, used: str, prefix: str) -> list[int | None]:
    """What the group and each one above it leave.

    In a container the group's own path may not exist below the mount, which then is the group itself.
    """
    group = mount / path.lstrip("/")
    groups = [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return [_room(folder, limit=limit, used=used, prefix=prefix) for folder in groups]


def _room(folder: Path, *, limit: str, used: str, prefix: str) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        taken = int((folder / used).read_text(encoding="utf-8"))
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:  # no such group, or one without a limit, as the topmost
        return None
    if most == "max":
        return None
    # Files that were read count as used, but the kernel drops them when the room is needed; and a checkpoint
    # that has just been verified is such a file.
    cached = int(facts.get(f"{prefix}inactive_file", 0)) + int(facts.get(f"{prefix}active_file", 0))
    return max(int(most) - taken + cached, 0)
