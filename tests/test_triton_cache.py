"""What the CUDA image brings for Triton is found before it is compiled, and the rest is cached as ever."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip(
    "triton", reason="Triton is not installed; it comes with torch's builds for CUDA, or `pip install triton`"
)

from triton import knobs
from triton.runtime import cache

from rlhf import triton_cache


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is ready; Triton's own cache is empty, and it is told of ours as the image tells it."""
    monkeypatch.setattr(triton_cache, "READY", tmp_path / "ready")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "rlhf.triton_cache:ReadyFirst")
    assert knobs.cache.manager_class is triton_cache.ReadyFirst
    return tmp_path / "ready"


def test_what_is_ready_is_found(ready: Path) -> None:
    manager = cache.get_cache_manager("00ff")
    assert manager.get_file("library.so") is None
    file = ready / manager.key / "library.so"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"made before")
    assert manager.get_file("library.so") == str(file)
    assert cache.get_cache_manager("00fe").get_file("library.so") is None


def test_the_rest_is_kept_in_tritons_own_cache(ready: Path) -> None:
    kept = cache.get_cache_manager("00ff").put(b"made now", "kernel.cubin")
    assert not ready.exists()
    assert cache.get_cache_manager("00ff").get_file("kernel.cubin") == kept
    assert Path(kept).read_bytes() == b"made now"
