"""One PPO iteration as it was recorded of trlX, by our engine and by trlX: `python -m tests.benchmarks.ppo_iteration`.

64 rollouts in chunks of 16, 4 epochs of batches of 16; GPT-J of 6 layers x 256, 8 heads, rotary 32, vocabulary 2048, 2
layers unfrozen; prompts of about 90 tokens, 48 new ones, never EOS; a reward model of the same size on sequences of up
to 160 tokens, delta reward; float32, one thread. Each engine in a process of its own, timed as in `trlx_ppo`.

trlX is trlX as it is: its generation, experience pass and training, and its summarize example's reward function, which
pads to the maximum, feeds each text twice and scores the reference summaries again at every rollout (`trlx_example`).
Before the times stands how far both are from each other on the same rollouts (`same_numbers`). Where trlX is not
installed, its recorded seconds stand beside ours; they are of another run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf.config import Config
from rlhf.tokenizer import load_tokenizer
from tests.benchmarks import trlx_example, trlx_ppo
from tests.benchmarks.trlx_ppo import ABSENT, be_child, measure, run_engine, table

PROGRAM = "tests.benchmarks.ppo_iteration"
WANTED = 3.5
RECORDED = {
    "generate": (4.3, 5.3),
    "score": (7.6, 8.8),
    "forward": (6.1, 7.4),
    "train": (16.6, 18.0),
    "samples/s": (1.6, 1.8),
}
"""trlX on this configuration, least and most of several runs: seconds an iteration, and samples a second."""


def parser() -> argparse.ArgumentParser:
    """The recorded configuration; what is smaller serves tests."""
    options = trlx_ppo.parser(PROGRAM)
    for name, default in (("heads", 8), ("rotary", 32), ("positions", 160)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.set_defaults(layers=6, hidden=256, vocabulary=2048, prompt=100, response=48, iterations=4)
    options.add_argument("--numbers", action="store_true", help=argparse.SUPPRESS)
    return options


def run_here(run_dir: Path, options: argparse.Namespace) -> dict[str, float]:
    """In this process: what `options.engine` takes, or how far both engines are from each other."""
    trlx_example.prepare(run_dir, options)
    config = trlx_ppo.settings(options)
    if options.numbers:
        from tests.benchmarks.same_numbers import differences

        return differences(config, run_dir, max_length=options.positions)
    if options.engine == "trlx":
        score_as_the_example(config, run_dir, max_length=options.positions)
    return run_engine(options.engine, run_dir, options)


def score_as_the_example(config: Config, run_dir: Path, *, max_length: int) -> None:
    """From now on our stage that runs trlX asks the example's reward function; for a child."""
    from rlhf.trlx import train

    tokenizer = load_tokenizer(run_dir / "sft" / "final", key="sft/final")

    def scorer(config: Config, reward: Path, device: object) -> trlx_example.ExampleScorer:
        return trlx_example.example_scorer(run_dir, tokenizer, max_length=max_length)

    train._scorer = scorer


def compare_numbers(arguments: list[str]) -> dict[str, float]:
    """In a child: the largest differences between both engines, by what differs."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", PROGRAM, *arguments, "--numbers", "--engine", "trlx", "--json", str(result)]
        subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}, check=True)
        found: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return found


def verdict(found: dict[str, dict[str, float]]) -> str:
    """How many times trlX's samples a second ours are, by this run's trlX or by the recorded one."""
    ours = found["builtin"]["samples/s"]
    if "trlx" in found:
        times = f"{ours / found['trlx']['samples/s']:.2f} times trlX's, in this run"
    else:
        least, most = RECORDED["samples/s"]
        times = f"{ours / most:.2f} to {ours / least:.2f} times trlX's, which is of other runs"
    return f"{ours:.2f} samples/s: {times}; at least {WANTED} is wanted"


def recorded(ours: dict[str, float]) -> str:
    """Our seconds beside trlX's recorded ones."""
    lines = [f"{'':<12}{'ours':>10}{'trlX, recorded in other runs':>32}"]
    for name, (least, most) in RECORDED.items():
        lines.append(f"{name:<12}{ours[name]:>10.3f}{f'{least} - {most}':>32}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the differences, the table and the verdict."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.engine:
        be_child(options, run_here)
        return
    results: dict[str, dict[str, float]] = {}
    if importlib.util.find_spec("trlx"):
        results["differences"] = compare_numbers(arguments)
        print("largest difference between both on the same rollouts:")
        print("\n".join(f"  {name:<26}{value:.1e}" for name, value in results["differences"].items()))
    results |= measure(options, arguments, program=PROGRAM)
    print(table(results) if "trlx" in results else f"{recorded(results['builtin'])}\n{ABSENT}")
    print(verdict(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
