"""Whether PPO's memory stays flat: `python -m tests.benchmarks.memory --iterations 500`.

A PPO run of a tiny model in a process of its own, with evaluations, saves and prunes. After each iteration the
process notes its resident set (RSS), its share of it (PSS), what is its alone (USS) and what no file backs (anonymous:
the heap, which other processes on the machine do not move). A line is fitted to what follows the warm-up, in which
allocators and caches find their size; its slope is what an iteration leaves behind.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers.utils import logging as transformers_logging

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.data import load_examples
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.prompt import encode_prompt
from rlhf.runtime import announce_device
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from tests.fakes import rewarded_run, tiny_policy
from tests.tiny_run import byte_tokenizer, tiny_config

KINDS = ("rss", "pss", "uss", "anonymous")
LEAKED_BYTES = 100_000


@dataclass(frozen=True)
class Line:
    """A line fitted to memory by iteration: KiB an iteration with its standard error, and KiB from end to end.

    The error takes the deviations for independent, so it is too small where memory moves in steps.
    """

    slope: float
    error: float
    drift: float


def fit(values: Sequence[float]) -> Line:
    """Ordinary least squares over 0, 1, 2 …; the drift is the mean of the last tenth less that of the first."""
    count, tenth = len(values), max(len(values) // 10, 1)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((place - middle) ** 2 for place in range(count))
    slope = sum((place - middle) * (value - mean) for place, value in enumerate(values)) / spread
    rest = sum((value - mean - slope * (place - middle)) ** 2 for place, value in enumerate(values))
    error = math.sqrt(rest / (count - 2) / spread)
    return Line(slope, error, (sum(values[-tenth:]) - sum(values[:tenth])) / tenth)


def usual_growth(values: Sequence[float], *, block: int) -> float:
    """KiB an iteration in the median of blocks of so many: what each iteration keeps, whatever a few steps add.

    Allocators take memory in steps, of which a line fitted to few iterations makes a slope.
    """
    edges = values[::block]
    return statistics.median(after - before for before, after in pairwise(edges)) / block


def measure(*, iterations: int, leak_from: int | None = None) -> dict[str, list[float]]:
    """KiB after each iteration of a PPO run in a child process, by kind of memory.

    From iteration `leak_from` on, the child keeps a tensor of LEAKED_BYTES from each, to see whether it is found.
    """
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--child", "--iterations", str(iterations)]
    if leak_from is not None:
        command += ["--leak-from", str(leak_from)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "samples.json"
        subprocess.run([*command, "--json", str(output)], check=True)
        samples: dict[str, list[float]] = json.loads(output.read_text(encoding="utf-8"))
    return samples


def ready_for_ppo(runs_dir: Path) -> Path:
    """A run that has all that PPO needs, with random weights."""
    run_dir = rewarded_run(runs_dir)
    tokenizer = byte_tokenizer()
    with StageDir(run_dir, "sft").publish(1, final=True) as directory:
        tiny_policy().save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    data = StageDir(run_dir, "fetch").final() / "data"
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        for split in ("train", "valid"):
            prompts = {e.post.id: encode_prompt(tokenizer, e.post, max_tokens=96) for e in load_examples(data, split)}
            rows = [EnvironmentRow(key, list(prompt.ids), prompt.cut_tokens, 0.25) for key, prompt in prompts.items()]
            write_environment(directory, split, rows)
    return run_dir


def settings(iterations: int) -> Config:
    """Short iterations; an evaluation in every second, a save and a prune in every fourth."""
    changes: dict[str, Any] = {
        "iterations": iterations,
        "unfrozen_layers": 1,
        "rollouts_per_iteration": 4,
        "rollout_chunk": 4,
        "inner_epochs": 1,
        "minibatch_size": 2,
        "micro_batch_size": 2,
        "eval_every_iterations": 2,
        "eval_posts": 2,
        "save_every_iterations": 4,
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
    }
    prompt = {"max_prompt_tokens": 96, "max_response_tokens": 8}
    return Config.model_validate(tiny_config().model_dump() | {"prompt": prompt, "ppo": changes})


def run_child(iterations: int, leak_from: int | None) -> dict[str, list[float]]:
    """Train, and note this process's memory after each iteration."""
    process, iterate, leaked = psutil.Process(), ppo.iterate, list[torch.Tensor]()
    # Taken beforehand: the samples themselves must not look like a leak.
    samples, done = np.ones((len(KINDS), iterations)), 0

    def watched(*arguments: Any) -> None:
        nonlocal done
        iterate(*arguments)
        if leak_from is not None and done >= leak_from:
            leaked.append(torch.ones(LEAKED_BYTES, dtype=torch.uint8))
        # What waits for the collector is no leak.
        gc.collect()
        memory = process.memory_full_info()
        samples[:, done] = memory.rss, memory.pss, memory.uss, memory.rss - memory.shared
        done += 1

    announce_device()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    ppo.iterate = watched  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        stage = StageDir(ready_for_ppo(Path(folder)), "ppo")
        # The libraries' own objects stay; without them, looking for garbage takes next to no time.
        gc.collect()
        gc.freeze()
        ppo.run(settings(iterations), stage, StopSignal())
    return {kind: (row / 1024).tolist() for kind, row in zip(KINDS, samples, strict=True)}


def main() -> None:
    """Measure, print a line for each kind of memory, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100, help="iterations that are not fitted")
    parser.add_argument("--leak-from", type=int, help="keep 100 kB of each iteration from this one on")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.json.write_text(json.dumps(run_child(options.iterations, options.leak_from)), encoding="utf-8")
        return
    if options.iterations < options.warm_up + 20:
        parser.error(f"--iterations {options.iterations} leaves fewer than 20 after --warm-up {options.warm_up}")
    samples = measure(iterations=options.iterations, leak_from=options.leak_from)
    lines = {kind: fit(values[options.warm_up :]) for kind, values in samples.items()}
    for kind, line in lines.items():
        print(
            f"{kind}: {line.slope:+.3f} ± {line.error:.3f} KiB an iteration, {line.drift:+.0f} KiB over "
            f"{options.iterations - options.warm_up} iterations, {samples[kind][-1] / 1024:.1f} MiB at the end"
        )
    if options.json:
        report = {"iterations": options.iterations, "warm_up": options.warm_up, "samples_kib": samples}
        report |= {"kib_per_iteration": {kind: asdict(line) for kind, line in lines.items()}}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
