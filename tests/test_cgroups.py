"""What a container may take, from control groups laid out by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf.cgroups import memory_room, usable_cores


def group(folder: Path, *, version: int, limit: str, used: int, inactive: int = 0, active: int = 0) -> None:
    """The files of a memory control group, as the kernel lays them out."""
    limit_file, used_file, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n")


def membership(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


def test_files_that_were_read_count_as_free_below_a_limit(tmp_path: Path) -> None:
    group(tmp_path / "fs", version=2, limit="1000", used=700, inactive=100, active=50)
    assert memory_room(tmp_path / "fs", membership(tmp_path, "0::/\n")) == 1000 - 700 + 100 + 50


def test_the_tightest_group_counts_and_the_topmost_has_no_files(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "kubepods" / "pod1", version=2, limit="500", used=450)
    group(root / "kubepods" / "pod1" / "main", version=2, limit="max", used=300)
    group(root / "kubepods", version=2, limit="5000", used=1000)
    assert memory_room(root, membership(tmp_path, "0::/kubepods/pod1/main\n")) == 50


def test_no_limit_anywhere_is_told(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "user", version=2, limit="max", used=300)
    assert memory_room(tmp_path / "fs", membership(tmp_path, "0::/user\n")) is None
    assert memory_room(tmp_path / "fs", tmp_path / "absent") is None


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "memory" / "docker" / "abc", version=1, limit="2000", used=1900, inactive=300)
    (root / "unified").mkdir()
    path = membership(tmp_path, "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    assert memory_room(root, path) == 2000 - 1900 + 300


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "memory", version=1, limit="800", used=900, inactive=50)
    assert memory_room(tmp_path / "fs", membership(tmp_path, "4:memory:/kubepods/pod1/abc\n")) == 0


def test_cores_are_those_of_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    root, path = tmp_path / "fs", membership(tmp_path, "0::/kubepods/pod1\n")
    assert usable_cores(root, path) == 16
    (root / "kubepods" / "pod1").mkdir(parents=True)
    (root / "kubepods" / "pod1" / "cpu.max").write_text("max 100000\n")
    assert usable_cores(root, path) == 16
    (root / "kubepods" / "cpu.max").write_text("350000 100000\n")
    assert usable_cores(root, path) == 3
    (root / "kubepods" / "pod1" / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(root, path) == 1


def test_cores_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    folder = tmp_path / "fs" / "cpu"
    folder.mkdir(parents=True)
    path = membership(tmp_path, "5:cpu,cpuacct:/docker/abc\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(tmp_path / "fs", path) == 16
    (folder / "cpu.cfs_quota_us").write_text("400000\n")
    assert usable_cores(tmp_path / "fs", path) == 4
