"""How the cost of a PPO iteration grows: `python -m tests.benchmarks.scaling --output found`.

Time and memory against rollouts, prompt length, layers (half of them trained) and width, each over five sizes, the rest
unchanged. Width counts as the parameters that it makes, which grow with its square. A line is fitted to each; its R^2
says how straight the points lie, the exponent is the slope of a line through their logarithms. Beside the time's stands
that of the operations that the iteration must spend (`limits`). What does not grow, such as the embedding's memory or
the start of each operation, holds exponents of small sizes below 1.

Seconds are the quickest iteration's after the first, on a CPU with one thread of the process's own CPU time. Memory is
what torch's allocator has given out at most, weights included, over two iterations.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.autograd.profiler import profile

from rlhf.telemetry import configure_logging
from tests.benchmarks.bench import choose_device, dtype_on
from tests.benchmarks.bench_run import Size, make_run, settings
from tests.benchmarks.machine import Clock
from tests.benchmarks.phases import free_memory, ppo_phases, quickest, run_iterations
from tests.benchmarks.plan import memory_events

BASE = Size(
    layers=4, unfrozen=2, hidden=128, heads=4, rotary=16, vocabulary=512, prompt=64, response=16, rollouts=32, scored=16
)
AXES: dict[str, tuple[Size, ...]] = {
    "rollouts": tuple(replace(BASE, rollouts=count) for count in (32, 64, 96, 128, 192)),
    "prompt": tuple(replace(BASE, prompt=count) for count in (64, 128, 192, 256, 384)),
    "layers": tuple(replace(BASE, layers=count, unfrozen=count // 2) for count in (2, 4, 6, 8, 12)),
    "parameters": tuple(replace(BASE, hidden=count, heads=count // 32) for count in (128, 192, 256, 320, 384)),
}


@dataclass(frozen=True)
class Point:
    """What an iteration took at x: seconds by phase, the most bytes alive, and the operations it must spend."""

    x: float
    seconds: Mapping[str, float]
    peak_bytes: int
    flops: float


@dataclass(frozen=True)
class Fit:
    """y = intercept + slope * x, how much of y's variance it explains, and d log y / d log x."""

    intercept: float
    slope: float
    r2: float
    exponent: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """By least squares; all numbers positive."""
    slope, intercept = np.polyfit(xs, ys, 1)
    residual = np.asarray(ys) - (intercept + slope * np.asarray(xs))
    r2 = 1 - float(residual @ residual) / float(np.var(ys) * len(ys))
    return Fit(float(intercept), float(slope), r2, float(np.polyfit(np.log(xs), np.log(ys), 1)[0]))


def measure(axis: str, size: Size, *, device: torch.device, threads: int, repeats: int) -> Point:
    """A size on an axis of AXES; a run of its own."""
    dtype, clock = dtype_on(device), Clock(device)
    config = settings(size, device=device.type, dtype=dtype, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        rows = make_run(run_dir, size, dtype=dtype)
        peak = peak_bytes(lambda: run_iterations(config, run_dir, rows, clock=clock, count=2), device)
        free_memory()
        found = run_iterations(config, run_dir, rows, clock=clock, count=repeats + 1)[1:]
    free_memory()
    x = size.shape(dtype).parameters if axis == "parameters" else getattr(size, axis)
    return Point(x, quickest(found), peak, ppo_phases(size, dtype)["iteration"].work.flops)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator had given out while the work ran, beyond those before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as told:
        work()
    return max(accumulate(change for _, change in memory_events(told)), default=0)


def report(axis: str, points: Sequence[Point]) -> str:
    """The points of an axis, and the fitted lines."""
    names = list(points[0].seconds)
    lines = [f"{axis:>12}" + "".join(f"{name:>12}" for name in names) + f"{'peak MB':>12}"]
    for point in points:
        cells = "".join(f"{point.seconds[name]:>12.3f}" for name in names)
        lines.append(f"{point.x:>12.6g}{cells}{point.peak_bytes / 1e6:>12.1f}")
    for name, found in fits(points).items():
        lines.append(
            f"  {name:<12} {found.intercept:.4g} + {found.slope:.4g} × {axis}, R² {found.r2:.4f}, "
            f"exponent {found.exponent:.2f}"
        )
    return "\n".join(lines)


def fits(points: Sequence[Point]) -> dict[str, Fit]:
    """Of each phase's seconds, the iteration's, the memory in MB and the operations in GFLOP."""
    xs = [point.x for point in points]
    found = {name: fit(xs, [point.seconds[name] for point in points]) for name in points[0].seconds}
    found["memory"] = fit(xs, [point.peak_bytes / 1e6 for point in points])
    return found | {"operations": fit(xs, [point.flops / 1e9 for point in points])}


def markdown(found: Mapping[str, Sequence[Point]]) -> str:
    """The table: a row an axis, how straight time and memory are, and the exponents of time and operations."""
    lines = [
        "| against | sizes | seconds, R² | exponent | exponent of the operations | memory, MB | R² |",
        "| --- " * 7 + "|",
    ]
    for axis, points in found.items():
        lines_of, sizes = fits(points), ", ".join(f"{point.x:.3g}" for point in points)
        time, memory, operations = (lines_of[name] for name in ("iteration", "memory", "operations"))
        lines.append(
            f"| {axis} | {sizes} | {time.r2:.4f} | {time.exponent:.2f} | {operations.exponent:.2f} | "
            f"{memory.intercept:.3g} + {memory.slope:.3g} × {axis} | {memory.r2:.4f} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling")
    options.add_argument("--only", choices=tuple(AXES), help="one axis")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")
    options.add_argument("--threads", type=int, default=1, help="of the CPU")
    options.add_argument("--repeats", type=int, default=3, help="of which the quickest counts")
    options.add_argument("--output", type=Path, help="a directory for scaling.json")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print each axis as it is done."""
    options = parser().parse_args(arguments)
    configure_logging(quiet=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells on stderr when it begins and ends
    device = choose_device(options)
    found: dict[str, list[Point]] = {}
    for axis, sizes in AXES.items():
        if options.only not in (None, axis):
            continue
        found[axis] = [
            measure(axis, size, device=device, threads=options.threads, repeats=options.repeats) for size in sizes
        ]
        print(report(axis, found[axis]), flush=True)
    print(markdown(found))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        result = {
            axis: {
                "points": [asdict(point) for point in points],
                "fits": {name: asdict(one) for name, one in fits(points).items()},
            }
            for axis, points in found.items()
        }
        (options.output / "scaling.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
