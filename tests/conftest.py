"""What every test may ask for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Third-party texts and recorded numbers, kept beside the repository and never in it."""
    folder = Path(os.environ.get("RLHF_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set RLHF_SHARED_DATA to a folder that holds it")
    return folder


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of the given size, which fills up for real; needs root."""
    volume = tmp_path / "volume"

    def mount(size: str) -> Path:
        volume.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(volume)]
        mounted = subprocess.run(command, check=False, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small tmpfs ({mounted.stderr.strip()}); run as root to test a full disk")
        return volume

    yield mount
    if volume.is_mount():
        subprocess.run(["umount", str(volume)], check=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are quickest on one thread, and results do not depend on the machine's cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
