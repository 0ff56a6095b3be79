"""What the driver tells, asked through a library made for the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.gpus import Gpus, needed_cuda
from tests.conftest import REPOSITORY

DRIVER = """
#include <stdlib.h>
static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int cuDriverGetVersion(int *version) { *version = number("FAKE_VERSION"); return 0; }
int cuInit(unsigned flags) { return number("FAKE_INIT"); }
int cuDeviceGetCount(int *count) { *count = number("FAKE_COUNT"); return 0; }
int cuGetErrorString(int code, const char **text) {
  if (code != 100) return 1;
  *text = "no CUDA-capable device is detected";
  return 0;
}
"""
ASK = """
import dataclasses, json, sys
from rlhf.gpus import visible_gpus
print(json.dumps(dataclasses.asdict(visible_gpus())))
sys.exit("torch" in sys.modules)
"""


@pytest.fixture(scope="session")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that answers what FAKE_* variables say."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver library with; install gcc")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "driver.c"], check=True)
    return folder


def ask(library_path: Path, **answers: int) -> Gpus:
    """What a process sees that finds the driver in this folder."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library_path)}
    environment |= {f"FAKE_{name.upper()}": str(value) for name, value in answers.items()}
    command = [sys.executable, "-c", ASK]
    answer = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return Gpus(**json.loads(answer.stdout))


def test_a_driver_tells_devices_and_cuda(driver_folder: Path) -> None:
    assert ask(driver_folder, version=13010, count=8) == Gpus(8, 13010, "")


def test_a_driver_without_a_device(driver_folder: Path) -> None:
    seen = ask(driver_folder, version=12080, init=100)
    assert seen == Gpus(0, 12080, "the driver says: no CUDA-capable device is detected (CUDA error 100)")
    assert ask(driver_folder, version=12080, count=0).problem == "the driver shows no device"


def test_an_error_that_the_driver_cannot_name(driver_folder: Path) -> None:
    assert ask(driver_folder, init=803).problem == "the driver answers with CUDA error 803"


def test_a_broken_driver_is_named(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    seen = ask(tmp_path)
    assert seen.count == 0
    assert "libcuda.so.1" in seen.problem


def test_the_cuda_that_torch_was_built_for() -> None:
    import torch

    assert needed_cuda() == torch.version.cuda
