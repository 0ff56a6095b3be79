"""How long training stands still for a checkpoint: `python -m tests.benchmarks.saving --megabytes 400`.

The same weights and moments are saved twice, alternately: as our stages do, with a copy to host memory and the rest in
the background, and at once, as a plain loop would. Both in one process, so that the machine is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlhf.checkpoint import StageDir
from rlhf.saver import HostBuffers, Saver


@dataclass(frozen=True)
class Standstill:
    """Medians in seconds: what training waits for, what the background takes with it, and a save at once."""

    megabytes: int
    waits: float
    in_background: float
    at_once: float

    @property
    def ratio(self) -> float:
        """How many times shorter the standstill is."""
        return self.at_once / self.waits


def measure(folder: Path, *, megabytes: int, rounds: int) -> Standstill:
    """Save so many megabytes so often in both ways."""
    tensors = {f"block.{number}": torch.randn(2**20 // 4) for number in range(megabytes)}
    waits, background, at_once = [], [], []
    stage, host = StageDir(folder / "run", "sft"), HostBuffers()
    host.copy(tensors.items())  # the memory is taken once, at the first save of a run
    with Saver(stage, keep=1) as saver:
        for number in range(rounds):
            started = time.perf_counter()
            copies = host.copy(tensors.items())
            saver.save(2 * number, lambda directory, copies=copies: save_file(copies, directory / "weights"))
            waits.append(time.perf_counter() - started)
            saver.wait()
            background.append(time.perf_counter() - started)
            started = time.perf_counter()
            with stage.publish(2 * number + 1) as directory:
                save_file(tensors, directory / "weights")
            stage.prune(1)
            at_once.append(time.perf_counter() - started)
    return Standstill(megabytes, *(statistics.median(times) for times in (waits, background, at_once)))


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.saving")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), megabytes=options.megabytes, rounds=options.rounds)
    print(
        f"{found.megabytes} MB: training waits {found.waits:.3f} s for the copy, the checkpoint is there after "
        f"{found.in_background:.3f} s; saved at once it would wait {found.at_once:.3f} s: {found.ratio:.1f} times that"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(found) | {"ratio": found.ratio}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
