"""Search for inputs that a reader cannot take, guided by the lines that they reach.

    python -m tests.fuzz.atheris_fuzz [target…] [--seconds N]

Needs atheris (`pip install atheris`; Python 3.11 to 3.13). Each target runs in a process of its own, since libFuzzer
ends the process it runs in. A crash is printed, with the place of its input, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target, in_memory

MAX_INPUT_BYTES = 4096
SECONDS_PER_INPUT = 20
_CASES = re.compile(r"stat::number_of_executed_units:\s+(\d+)")


def main() -> int:
    """Run the targets that are named, or all; 1 when one of them crashed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [target.name for target in TARGETS]
    parser.add_argument("targets", nargs="*", metavar="target", help=f"one or several of {', '.join(names)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--inside", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(names):
        parser.error(f"no target {min(unknown)}; known are {', '.join(names)}")
    chosen = [target for target in TARGETS if target.name in (options.targets or names)]
    if options.inside:
        search(chosen[0], options.seconds, options.inside)
    total, crashed = 0, []
    for target in chosen:
        cases, failure = run(target, options.seconds)
        total += cases
        if failure:
            crashed.append(target.name)
            print(failure, flush=True)
        print(f"{target.name:<24}{cases:>10} cases{'  CRASHED' if failure else ''}", flush=True)
    print(f"{'in total':<24}{total:>10} cases, {len(crashed)} crashed", flush=True)
    return 1 if crashed else 0


def run(target: Target, seconds: int) -> tuple[int, str]:
    """Search in a process of its own: the cases tried, and what the process said where it found a crash."""
    folder = tempfile.mkdtemp(prefix=f"fuzz-{target.name}-", dir=in_memory())
    command = [sys.executable, "-m", "tests.fuzz.atheris_fuzz", target.name]
    command += ["--seconds", str(seconds), "--inside", folder]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="backslashreplace")
    found = _CASES.search(done.stderr)
    if done.returncode == 0:
        shutil.rmtree(folder)
    return int(found[1]) if found else 0, "" if done.returncode == 0 else done.stdout + done.stderr


def search(target: Target, seconds: int, folder: Path) -> None:
    """Become libFuzzer on a target, beginning with its samples; never comes back."""
    import atheris

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for name in ("corpus", "files"):
        (folder / name).mkdir()
    samples = target.samples()
    for number, sample in enumerate(samples):
        (folder / "corpus" / str(number)).write_bytes(sample)
    forget_imports()
    with atheris.instrument_imports(include=["rlhf"], enable_loader_override=False):
        target.attempt(samples[0], folder / "files")  # imports the reader

    def one(data: bytes) -> None:
        target.attempt(data, folder / "files")

    options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={SECONDS_PER_INPUT}"]
    options += ["-print_final_stats=1", "-rss_limit_mb=0", f"-artifact_prefix={folder}{os.sep}"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


def forget_imports() -> None:
    """Let the readers that the samples have imported be imported again, with instruments; errors stay what they are."""
    for name in [name for name in sys.modules if name.startswith("rlhf.") and name != "rlhf.errors"]:
        del sys.modules[name]


if __name__ == "__main__":
    sys.exit(main())
