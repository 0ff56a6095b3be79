"""Each phase against what the machine can do: `python -m tests.benchmarks.bench --preset 6b --output found`.

Measures the machine (large products of matrices, memory), then each phase of our code with random weights, on a CPU
(float32) or a GPU (bfloat16), and prints seconds, the operations that the phase must spend (`limits`) and the share of
the machine's limit that was reached. `--output` gets bench.json and bench.svg. On a CPU with one thread the seconds
are those of the process's own CPU time, to which other programs on the machine add nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint import StageDir
from rlhf.runtime import announce_device
from rlhf.telemetry import configure_logging
from tests.benchmarks.bench_run import PRESETS, Size, make_run, settings
from tests.benchmarks.limit_chart import chart
from tests.benchmarks.limits import Machine
from tests.benchmarks.machine import Clock, Measured, measure_machine
from tests.benchmarks.phases import free_memory, tasks, time_iterations, time_sampling, time_scoring
from tests.benchmarks.trlx_ppo import count_cpu_time

WANTED = {"scoring": 80.0, "summaries": 50.0, "ppo iteration": 8.0}
"""A second, on one H200 with the preset 6b: sequences, summaries and rollouts."""


def parser() -> argparse.ArgumentParser:
    """The options; each field of Size is one, which changes the preset."""
    options = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench")
    options.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")
    options.add_argument("--threads", type=int, default=1, help="of the CPU")
    options.add_argument("--repeats", type=int, default=3, help="of which the quickest counts")
    options.add_argument("--output", type=Path, help="a directory for bench.json and bench.svg")
    options.add_argument(
        "--limits-of", type=float, nargs=2, metavar=("TFLOPS", "TBPS"), help="only say what such a machine's limits are"
    )
    for field in fields(Size):
        options.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    return options


def size_of(options: argparse.Namespace) -> Size:
    """The preset with the changes that were asked for."""
    changes = {field.name: getattr(options, field.name) for field in fields(Size)}
    return replace(PRESETS[options.preset], **{name: value for name, value in changes.items() if value is not None})


def measure(size: Size, *, device: torch.device, threads: int, repeats: int) -> dict[str, float]:
    """Seconds of every phase, in a run of its own that is gone afterwards."""
    dtype, clock = dtype_on(device), Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        rows = make_run(run_dir, size, dtype=dtype)
        policy, reward = (StageDir(run_dir, stage).final() for stage in ("sft", "reward"))
        found = time_sampling(policy, rows, size, dtype=dtype, clock=clock, repeats=repeats)
        free_memory()
        found |= time_scoring(reward, rows, size, dtype=dtype, clock=clock, repeats=repeats)
        free_memory()
        config = settings(size, device=device.type, dtype=dtype, threads=threads)
        return found | time_iterations(config, run_dir, rows, clock=clock, count=repeats)


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def as_rows(seconds: Mapping[str, float], size: Size, dtype: torch.dtype, limit: Machine) -> list[dict[str, Any]]:
    """The table's numbers."""
    return [
        {
            "phase": name,
            "seconds": seconds[name],
            "gflop": task.phase.work.flops / 1e9,
            "gbyte": task.phase.work.bytes / 1e9,
            "limit_seconds": task.phase.seconds(limit),
            "share": task.phase.seconds(limit) / seconds[name],
            "per_second": task.count / seconds[name],
            "unit": task.unit,
        }
        for name, task in tasks(size, dtype).items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a phase."""
    lines = [f"{'phase':<16}{'seconds':>10}{'GFLOP':>11}{'GB':>9}{'limit s':>10}{'reached':>9}{'a second':>11}"]
    lines += [
        f"{row['phase']:<16}{row['seconds']:>10.4f}{row['gflop']:>11.1f}{row['gbyte']:>9.2f}"
        f"{row['limit_seconds']:>10.4f}{row['share']:>9.1%}{row['per_second']:>11.1f} {row['unit']}"
        for row in rows
    ]
    return "\n".join(lines)


def machine_line(machine: Measured) -> str:
    """What the limits are made of."""
    return (
        f"{machine.name}, {machine.dtype}, {machine.threads} threads: {machine.flops / 1e9:.0f} GFLOP/s, reads "
        f"{machine.read / 1e9:.1f} GB/s, copies {machine.copy / 1e9:.1f} GB/s, "
        f"{machine.step_seconds * 1e6:.1f} µs the smallest step"
    )


def targets(rows: Sequence[dict[str, Any]]) -> str:
    """What is wanted of the preset 6b on one H200, beside what was reached."""
    reached = {row["phase"]: row for row in rows}
    lines = ["", "wanted on one H200:"]
    for phase, wanted in WANTED.items():
        row = reached[phase]
        verdict = "reached" if row["per_second"] >= wanted else "missed"
        lines.append(f"  {phase:<14} {wanted:.0f} {row['unit']}/s: {row['per_second']:.1f}, {verdict}")
    return "\n".join(lines)


def elsewhere(size: Size, numbers: Sequence[float]) -> str:
    """The table of a machine that is not here, were it at its limit; numbers are its TFLOP/s and TB/s in bfloat16."""
    limit = Machine(flops=numbers[0] * 1e12, bandwidth=numbers[1] * 1e12)
    dtype = torch.bfloat16
    seconds = {name: task.phase.seconds(limit) for name, task in tasks(size, dtype).items()}
    return table(as_rows(seconds, size, dtype, limit))


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it where that is asked for."""
    options = parser().parse_args(arguments)
    size = size_of(options)
    if options.limits_of:
        print(elsewhere(size, options.limits_of))
        return
    configure_logging(quiet=True)
    device = choose_device(options)
    machine = measure_machine(device, dtype_on(device))
    print(machine_line(machine), flush=True)
    seconds = measure(size, device=device, threads=options.threads, repeats=options.repeats)
    rows = as_rows(seconds, size, dtype_on(device), machine.machine)
    print(table(rows))
    if options.preset == "6b" and device.type == "cuda":
        print(targets(rows))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        result = {"machine": asdict(machine), "size": asdict(size), "phases": rows}
        (options.output / "bench.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        (options.output / "bench.svg").write_text(chart({"": rows}, title=machine_line(machine)), encoding="utf-8")


def choose_device(options: argparse.Namespace) -> torch.device:
    """The device and threads that were asked for; on a CPU with one thread all clocks tell CPU time from now on."""
    announce_device()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    torch.set_num_threads(options.threads)
    # As `prepare_runtime` does; it must be named before CUDA starts, which measuring the machine does.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if name == "cpu" and options.threads == 1:
        count_cpu_time()
    return torch.device(name)


if __name__ == "__main__":
    main()
