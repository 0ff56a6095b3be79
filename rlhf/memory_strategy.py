"""What weights, gradients and optimiser state take on each device and in its host's memory, by strategy.

Trained weights are float32 under each of them (4 bytes a number), with AdamW's two moments (8). The figures of ZeRO
are those of DeepSpeed 0.19: `runtime/zero/stage_1_and_2.py`, `stage3.py` and the defaults in `config.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError

Parts = dict[str, int]
"""Bytes by what they are for."""

FLOAT = 4
MOMENTS = 8
STRATEGIES = ("ddp", "zero2", "zero2-offload", "zero3", "zero3-offload")
"""Those that are shipped, from the fastest to the most sparing."""

REDUCE_BUCKET, LIVE_WEIGHTS, PREFETCHED = 500_000_000, 1_000_000_000, 50_000_000
"""DeepSpeed's defaults: numbers in a bucket of gradients, gathered at most at once, and fetched ahead."""


@dataclass(frozen=True)
class Strategy:
    """How state is spread: stage 0 is DDP. Buckets and gathered weights are counts of numbers."""

    name: str
    stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    reduce_buckets: int = 0
    gathered: int = 0


def read_strategy(deepspeed: str | None, *, key: str) -> Strategy:
    """The strategy that a configuration names: None for DDP, a shipped name, or the path of a DeepSpeed file.

    Raises ConfigError for a file that is not there or says no ZeRO stage.
    """
    if deepspeed is None:
        return Strategy("ddp")
    shipped = resources.files("rlhf") / "configs" / "deepspeed" / f"{deepspeed}.json"
    file = shipped if shipped.is_file() else Path(deepspeed)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        zero: dict[str, Any] = settings["zero_optimization"]
        stage = int(zero["stage"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        names = ", ".join(STRATEGIES[1:])
        raise ConfigError(f"{key}={deepspeed}: no DeepSpeed file with a ZeRO stage ({error!r}); try {names}") from error
    bucket = _number(zero, "reduce_bucket_size", REDUCE_BUCKET)
    double = stage < 3 and zero.get("overlap_comm", False) and zero.get("contiguous_gradients", True)
    # A weight that is used again within so many others stays, whatever the most is that may live at once.
    live = (_number(zero, f"stage3_max_{name}", LIVE_WEIGHTS) for name in ("live_parameters", "reuse_distance"))
    gathered = max(live) + _number(zero, "stage3_prefetch_bucket_size", PREFETCHED)
    return Strategy(
        deepspeed if shipped.is_file() else Path(deepspeed).stem,
        stage,
        offload_optimizer=_device(zero, "offload_optimizer") == "cpu",
        offload_weights=_device(zero, "offload_param") == "cpu",
        reduce_buckets=bucket * (2 if double else 1),
        gathered=gathered if stage == 3 else 0,
    )


def training_state(strategy: Strategy, *, trained: int, frozen_bytes: int, processes: int) -> tuple[Parts, Parts]:
    """What lies on a device while its process trains, and in host memory beside it; both in bytes a process."""
    share = -(-trained // processes)
    if strategy.stage == 0:
        return {
            "weights": FLOAT * trained + frozen_bytes,
            "gradients": FLOAT * trained,
            "optimiser": MOMENTS * trained,
        }, {}
    device: Parts = {"buckets": FLOAT * strategy.reduce_buckets}
    host: Parts = {}
    if strategy.stage < 3:
        device["weights"] = FLOAT * trained + frozen_bytes
    else:
        whole = FLOAT * trained + frozen_bytes
        device["gathered weights"] = min(FLOAT * strategy.gathered, whole)
        (host if strategy.offload_weights else device)["weights"] = -(-whole // processes)
    state = host if strategy.offload_optimizer else device

    state["gradients"] = FLOAT * share
    state["optimiser"] = (FLOAT + MOMENTS) * share  # with the float32 masters
    if strategy.offload_optimizer and strategy.stage < 3:
        state["optimiser"] += FLOAT * share  # a pinned buffer by which weights come back
    return device, host


def _number(settings: dict[str, Any], key: str, default: int) -> int:
    value = settings.get(key, default)
    return int(value) if isinstance(value, int | float) else default


def _device(settings: dict[str, Any], key: str) -> str:
    part = settings.get(key)
    return str(part.get("device", "none")) if isinstance(part, dict) else "none"
