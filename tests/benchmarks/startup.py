"""How long help takes, and how long the service takes to be ready, against the time that reading its weights takes.

    python -m tests.benchmarks.startup --layers 12 --hidden 1536    # 1.4 GB of policy, and as much of reward model
    python -m tests.benchmarks.startup --policy-mb 2000 --json startup.json

The service: from the start of `python -m app` to the first GET /readyz that answers 200, with one policy and a reward
model, both with random weights. Reading: a Python process that imports nothing and reads the same files one after the
other, 16 MiB at a time, into memory of its own, which it keeps; from its start to its end. Warm: the files are in the
machine's page cache. Cold: they have been dropped from it; below a virtual machine another cache can still hold them.
Both take turns, and the best of each counts, since a start can only be held up. The seconds of processor time stand
beside, for a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rlhf.config import TinyModelConfig
from rlhf.models import create_tiny_gptj
from rlhf.weights import weight_files
from tests.conftest import REPOSITORY
from tests.fakes import EOS_ID, PAD_ID, tiny_reward_model
from tests.live_service import live_service
from tests.served_run import publish_model

READER = """
import mmap, os, sys
kept = []
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        size = os.stat(path).st_size
        kept.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        view, place = memoryview(kept[-1]), 0
        while place < size:
            place += file.readinto(view[place : place + 2**24])
"""
IMPORTS = "import app.service, app.main, app.server"
HEADS, VOCABULARY, POSITIONS = 4, 260, 128
READY_SECONDS = 600.0


@dataclass(frozen=True)
class Spent:
    """What a process took, from its start to its end or until it was ready."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class StartUp:
    """The best of each; one pair of reading and ready for each state of the page cache."""

    weight_bytes: int
    help: Spent
    imports: Spent
    reading: dict[str, Spent]
    ready: dict[str, Spent]

    def ratio(self, cache: str) -> float:
        """How many times the time to read the weights the service takes to be ready."""
        return self.ready[cache].wall_seconds / self.reading[cache].wall_seconds

    def to_json(self) -> str:
        """All numbers, the ratios among them."""
        return json.dumps(asdict(self) | {"ratio": {cache: self.ratio(cache) for cache in self.ready}}, indent=1)


def measure(
    folder: Path, *, layers: int, hidden: int, rounds: int = 1, caches: Sequence[str] = ("cold", "warm")
) -> StartUp:
    """Publish models of this shape in the folder and start everything so often."""
    run_dir = make_run(folder, layers=layers, hidden=hidden)
    files = [file for name in ("ppo", "reward") for file in weight_files(run_dir / name / "final")]
    reading: dict[str, list[Spent]] = {cache: [] for cache in caches}
    ready: dict[str, list[Spent]] = {cache: [] for cache in caches}
    help_, imports = [], []
    for _ in range(rounds):
        help_.append(run([sys.executable, "-m", "rlhf", "--help"]))
        imports.append(run([sys.executable, "-c", IMPORTS]))
        for cache in caches:
            prepare: Callable[[Sequence[Path]], None] = drop if cache == "cold" else bring
            prepare(files)
            reading[cache].append(run([sys.executable, "-c", READER, *map(str, files)]))
            prepare(files)
            ready[cache].append(start(run_dir, folder / "log"))
    return StartUp(
        weight_bytes=sum(file.stat().st_size for file in files),
        help=best(help_),
        imports=best(imports),
        reading={cache: best(spent) for cache, spent in reading.items()},
        ready={cache: best(spent) for cache, spent in ready.items()},
    )


def make_run(folder: Path, *, layers: int, hidden: int) -> Path:
    """A run with a GPT-J and a reward model of the same size; both have random weights, in float32."""
    run_dir = folder / "startup"
    shape = TinyModelConfig(
        layers=layers, hidden=hidden, heads=HEADS, rotary_dim=hidden // HEADS // 2, vocab_size=VOCABULARY
    )
    policy = create_tiny_gptj(shape, positions=POSITIONS, vocab_size=VOCABULARY, eos_id=EOS_ID, pad_id=PAD_ID, seed=1)
    publish_model(run_dir, "ppo", policy, step=1)
    publish_model(run_dir, "reward", tiny_reward_model(policy), step=1)
    return run_dir


def layers_for(megabytes: int, hidden: int) -> int:
    """Blocks with which a policy takes about so many megabytes; one has 12 hidden² numbers of 4 bytes."""
    return max(1, round(megabytes * 1e6 / (48 * hidden**2)))


def run(command: Sequence[str]) -> Spent:
    """A process, from its start to its end."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - started, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(wall, spent)


def start(run_dir: Path, log_file: Path) -> Spent:
    """The service, from its start until it is ready."""
    started = time.perf_counter()
    with live_service(run_dir, log_file, ready=False, models="ppo", threads=1) as service:
        while service.client.get("/readyz").status_code != 200:
            if service.process.poll() is not None or time.perf_counter() - started > READY_SECONDS:
                raise RuntimeError(f"the service is not ready after {time.perf_counter() - started:.0f} s")
            time.sleep(0.02)
        wall = time.perf_counter() - started
        times = psutil.Process(service.process.pid).cpu_times()
        return Spent(wall, times.user + times.system)


def drop(files: Sequence[Path]) -> None:
    """Have the page cache forget what it holds of these."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring(files: Sequence[Path]) -> None:
    """Have the page cache hold these."""
    piece = bytearray(2**24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def best(spent: Sequence[Spent]) -> Spent:
    """The shortest of several."""
    return min(spent, key=lambda one: one.wall_seconds)


def told(found: StartUp) -> str:
    """A line for each number."""
    lines = [
        f"rlhf --help: {_seconds(found.help)}",
        f"the service's imports alone: {_seconds(found.imports)}",
    ]
    for cache, ready in found.ready.items():
        lines.append(
            f"{cache}: {found.weight_bytes / 1e6:.0f} MB of weights are read in {_seconds(found.reading[cache])}, "
            f"and the service is ready in {_seconds(ready)}: {found.ratio(cache):.2f} times"
        )
    return "\n".join(lines)


def _seconds(spent: Spent) -> str:
    return f"{spent.wall_seconds:.2f} s (processor {spent.cpu_seconds:.2f} s)"


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.startup")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--policy-mb", type=int, help="choose the layers so that the policy has about this size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    layers = layers_for(options.policy_mb, options.hidden) if options.policy_mb else options.layers
    caches = ("cold", "warm") if hasattr(os, "posix_fadvise") else ("warm",)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), layers=layers, hidden=options.hidden, rounds=options.rounds, caches=caches)
    print(told(found))
    if options.json:
        options.json.write_text(found.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
