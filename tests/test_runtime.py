"""Seeds, devices and threads."""

import random

import numpy as np
import pytest
import torch

from rlhf.config import RuntimeConfig
from rlhf.errors import ConfigError
from rlhf.runtime import choose_device, generator, prepare_runtime, seed_everything, torch_dtype


def test_a_seed_fixes_every_source_of_chance() -> None:
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_streams_are_reproducible_and_distinct() -> None:
    def draw(*parts: int) -> float:
        return torch.rand(1, generator=generator(*parts), dtype=torch.float64).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(1, 2, 4), draw(1, 3, 2), draw(2, 2, 3), draw(1, 2)}) == 5


def test_cuda_where_there_is_none_is_refused() -> None:
    if torch.cuda.is_available():
        assert choose_device(RuntimeConfig(device="auto")).type == "cuda"
        return
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda, but no CUDA device is visible"):
        choose_device(RuntimeConfig(device="cuda"))
    assert choose_device(RuntimeConfig(device="auto")).type == "cpu"


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_precisions(name: str, dtype: torch.dtype) -> None:
    assert torch_dtype(name) is dtype


@pytest.mark.parametrize(("asked", "cores", "expected"), [(None, 1, 1), (None, 999, 2), (3, 1, 3)])
def test_no_more_threads_than_a_container_may_use(
    asked: int | None, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which the call would set for all that follows
    monkeypatch.setattr("rlhf.cgroups.usable_cores", lambda root, membership: cores)
    try:
        torch.set_num_threads(2)
        prepare_runtime(RuntimeConfig(device="cpu", threads=asked), seed=1)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
