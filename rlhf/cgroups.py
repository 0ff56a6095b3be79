"""What a container may take of its machine: the limits of this process's control groups, version 1 or 2."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores(root: Path, membership: Path) -> int:
    """CPU cores that this process may keep busy, rounded down, at least 1.

    torch counts those of the machine; more threads than a container's quota wait for each other, spinning.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in group_folders(root, membership, "cpu") if (quota := _quota(folder)) is not None]
    return max(1, int(min([affinity, *quotas])))


def memory_room(root: Path, membership: Path) -> int | None:
    """Bytes left below the tightest memory limit; None where no group sets one."""
    rooms = [room for folder in group_folders(root, membership, "memory") if (room := _room(folder)) is not None]
    return min(rooms, default=None)


def group_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """The process's group and each one above it, by the controller's mount.

    root is laid out as /sys/fs/cgroup, membership as /proc/self/cgroup. In a container the group's own path may not
    exist below the mount, which then is the group itself.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controller if controllers else root
        group = mount / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores that a group may use; None without a limit."""
    if (limit := _read(folder / "cpu.max")) is not None:
        quota, period = limit.split()
    else:
        quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "100000"
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _room(folder: Path) -> int | None:
    """Bytes that a group leaves; None without a limit."""
    most, used, prefix = _read(folder / "memory.max"), _read(folder / "memory.current"), ""
    if most is None:
        most, used = _read(folder / "memory.limit_in_bytes"), _read(folder / "memory.usage_in_bytes")
        prefix = "total_"
    statistics = _read(folder / "memory.stat")
    if most is None or used is None or statistics is None or most == "max":
        return None
    facts = dict(line.split() for line in statistics.splitlines())
    # Files that were read count as used, but the kernel drops them when the room is needed; and a checkpoint
    # that has just been verified is such a file.
    cached = int(facts.get(f"{prefix}inactive_file", 0)) + int(facts.get(f"{prefix}active_file", 0))
    return max(int(most) - int(used) + cached, 0)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # no such group, or one without this limit, as the topmost
        return None
