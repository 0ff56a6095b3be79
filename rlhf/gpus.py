"""How many GPUs this process sees and which CUDA their driver knows, asked of the driver itself.

No torch, no CUDA context, a fraction of a second.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Gpus:
    """What the driver shows; `problem` says why it shows none. driver_cuda is 13000 for CUDA 13.0, 0 if unknown."""

    count: int
    driver_cuda: int
    problem: str


def visible_gpus() -> Gpus:
    """Ask the driver; CUDA_VISIBLE_DEVICES is heeded, as by every program that uses it."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return Gpus(0, 0, f"there is no NVIDIA driver here ({error})")
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    if code := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return Gpus(0, version.value, _explain(driver, code))
    return Gpus(count.value, version.value, "" if count.value else "the driver shows no device")


def needed_cuda() -> str | None:
    """The CUDA version that torch was built for, such as `13.0`; None for a build without. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    version: str | None = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))["cuda"]
    return version


def _explain(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value:
        return f"the driver says: {text.value.decode()} (CUDA error {code})"
    return f"the driver answers with CUDA error {code}"
