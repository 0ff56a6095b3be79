"""Whether `rlhf plan` tells the truth: `python -m tests.benchmarks.plan --markdown table.md`.

Each case runs a stage as it is, in a process of its own, on a model of some 30 million parameters and on rows that
are all as long as the settings let them be, and compares the fullest moment of each phase with what was planned.

What is measured is what torch's allocator has given out. On a GPU that is `torch.cuda.max_memory_allocated`. On the CPU
the profiler tells of each piece of memory that is taken and given back, workspaces inside operations included; adding
them up gives the same number. Resident memory (RSS) would not: it holds what libraries and pages cost, keeps what was
given back, and depends on what ran before.
Only what stands before the first checkpoint counts on the CPU, whose copies for checkpoints lie in the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.profiler import profile
from transformers.utils import logging as transformers_logging

from rlhf import training, weight_reading
from rlhf.checkpoint import StageDir
from rlhf.config import Config, TinyModelConfig
from rlhf.data import Comparison, Example, write_jsonl
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.generation import BuiltinEngine
from rlhf.memory_stages import NEEDS
from rlhf.memory_strategy import read_strategy
from rlhf.memory_trained import Setting
from rlhf.model_families import read_shape
from rlhf.models import create_tiny_gptj, reward_model_from_policy
from rlhf.prompt import Post, encode_prompt
from rlhf.runtime import all_processes, announce_device
from rlhf.scoring import Scorer
from rlhf.stages import evaluate, ppo, prepare, reward, sft
from rlhf.stopping import StopSignal
from tests.tiny_run import byte_tokenizer

SHAPE = TinyModelConfig(layers=8, hidden=512, heads=8, rotary_dim=32, vocab_size=8192)
PROMPT, RESPONSE = 160, 32
POSTS = 16
MEASURED_AS = {name: name for name in ("summaries", "scores", "rollouts", "likelihoods")} | {"gathering": "summaries"}
"""Phases of the plan that are not moments of a step, by the phase in which they are measured."""
RUNS: dict[str, Callable[[Config, StageDir, StopSignal], None]] = {
    "sft": sft.run,
    "reward": reward.run,
    "prepare": prepare.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
}


@dataclass(frozen=True)
class Case:
    """A stage and the settings that are not the usual ones, as `key.path: value`; processes share it."""

    stage: str
    changes: dict[str, Any] = field(default_factory=dict)
    processes: int = 1

    @property
    def name(self) -> str:
        """As the table shows it."""
        changes = ", ".join(f"{key.removeprefix(self.stage + '.')}: {value}" for key, value in self.changes.items())
        return f"{changes or 'float32'}" + (f", {self.processes} processes" if self.processes > 1 else "")


WAIT_SECONDS = 0.002
"""After a collective: its own thread, which holds the tensors too, lets go within that."""

TWO_STEPS_ALONE = {"sft.epochs": 2, "sft.max_steps": 3, "sft.eval_every_steps": 2}
BF16 = {"runtime.precision": "bfloat16"}
CASES = (
    Case("sft"),
    Case("sft", BF16),
    Case("sft", {"sft.gradient_checkpointing": True}),
    Case("sft", {"sft.gradient_checkpointing": True} | BF16),
    Case("sft", {"sft.loss_on": "all", "sft.micro_batch_size": 2}),
    Case("reward"),
    Case("reward", {"reward.frozen_fraction": 0} | BF16),
    Case("reward", {"reward.gradient_checkpointing": True}),
    Case("prepare"),
    Case("prepare", BF16),
    Case("ppo"),
    Case("ppo", BF16),
    Case("ppo", {"ppo.unfrozen_layers": "all", "ppo.value_network": "separate"}),
    Case("ppo", {"ppo.lora.rank": 16}),
    Case("sft", {"sft.batch_size": 8}, processes=2),
    Case("sft", {"sft.batch_size": 8, "sft.deepspeed": "zero2"}, processes=2),
    # DeepSpeed keeps gathered weights for the next use once it has seen two steps without an evaluation in between.
    Case("sft", {"sft.batch_size": 8, "sft.deepspeed": "zero3"} | TWO_STEPS_ALONE, processes=2),
    Case("ppo", {"ppo.deepspeed": "zero3"}, processes=2),
    Case("evaluate"),
    Case("evaluate", BF16),
)


SMALL_BUCKETS = {
    "reduce_bucket_size": 5_000_000,
    "stage3_max_live_parameters": 10_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
}
"""In place of DeepSpeed's, each of which would hold this model many times over."""


def with_small_buckets(name: str, folder: Path) -> str:
    """The path of a shipped DeepSpeed file, with buckets for a small model."""
    shipped = resources.files("rlhf") / "configs" / "deepspeed" / f"{name}.json"
    tree = json.loads(shipped.read_text(encoding="utf-8"))
    tree["zero_optimization"] |= SMALL_BUCKETS
    file = folder / f"{name}.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return str(file)


def settings(case: Case, folder: Path) -> Config:
    """Two steps of a stage, of which the second finds the optimiser's moments; nothing is saved before the last."""
    optimizer = {"learning_rate": 1e-5, "warmup_steps": 0}
    trained = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2, "eval_every_steps": 1, "save_every_steps": 100}
    tree: dict[str, Any] = {
        "prompt": {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE},
        "runtime": {"tensorboard": False, "log_every_steps": 1, "threads": 1, "max_bad_steps": 100},
        "sft": trained | {"rouge_posts": 8, "optimizer": optimizer},
        "reward": trained | {"batch_size": 2, "micro_batch_size": 2, "frozen_fraction": 0.5, "optimizer": optimizer},
        "prepare": {"batch_tokens": 8 * (PROMPT + RESPONSE)},
        "ppo": {
            "iterations": 1, "unfrozen_layers": 4, "rollouts_per_iteration": 8, "rollout_chunk": 4, "inner_epochs": 1,
            "minibatch_size": 4, "micro_batch_size": 4, "eval_posts": 4, "max_kl": 1e9, "optimizer": optimizer,
        },
        "evaluate": {"batch_size": 8, "batch_tokens": 8 * (PROMPT + RESPONSE), "bootstrap_samples": 100},
    }  # fmt: skip
    for key, change in case.changes.items():
        (section, _, name), value = key.partition("."), change
        if name == "deepspeed":
            value = with_small_buckets(value, folder)
        if "." in name:
            name, _, inner = name.partition(".")
            value = tree[section].get(name, {}) | {inner: value}
        tree[section][name] = value
    return Config.model_validate(tree)


def make_run(run_dir: Path, shape: TinyModelConfig = SHAPE) -> None:
    """A run whose every stage has finished, with random weights and posts of one length."""
    tokenizer = byte_tokenizer()
    posts = [Post(subreddit="pets", title=f"{index:03d}", body="x" * 2 * PROMPT) for index in range(POSTS)]
    examples = [Example(post, "y" * 2 * RESPONSE, "writer") for post in posts]
    pairs = [Comparison(post, "y" * 2 * RESPONSE, "z" * 2 * RESPONSE, "judge", 1.0, {}) for post in posts]
    model = create_tiny_gptj(
        shape, positions=PROMPT + RESPONSE, vocab_size=shape.vocab_size, eos_id=256, pad_id=257, seed=1
    )
    for stage in ("fetch", "sft", "ppo", "reward", "prepare"):
        with StageDir(run_dir, stage).publish(1, final=True) as directory:
            folder = directory / "base" if stage == "fetch" else directory
            if stage == "reward":
                model = reward_model_from_policy(StageDir(run_dir, "sft").final(), seed=1)
                (directory / "metrics.json").write_text("{}", encoding="utf-8")
            if stage != "prepare":
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            if stage == "fetch":
                (directory / "data").mkdir()
                for split in ("train", "valid", "test"):
                    write_jsonl(directory / "data" / f"posts-{split}.jsonl", (row.to_row() for row in examples))
                    write_jsonl(directory / "data" / f"comparisons-{split}.jsonl", (row.to_row() for row in pairs))
            for split in ("train", "valid") if stage == "prepare" else ():
                ids = [list(encode_prompt(tokenizer, post, max_tokens=PROMPT).ids) for post in posts]
                rows = [EnvironmentRow(p.id, i, 0, 0.0) for p, i in zip(posts, ids, strict=True)]
                write_environment(directory, split, rows)


class Windows:
    """When which phase ran, in nanoseconds, until the first checkpoint."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []
        self.closed = False

    def watch(self, owner: Any, function: str, phase: str) -> None:
        """Note each call of a function as a span of the phase."""
        inner = getattr(owner, function)

        def watched(*arguments: Any, **named: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.time_ns()
            try:
                return inner(*arguments, **named)
            finally:
                if not self.closed:
                    self.note(phase, started)

        setattr(owner, function, watched)

    def note(self, phase: str, started: int) -> None:
        """A span has ended; on a GPU its peak stands in place of its beginning."""
        if torch.cuda.is_available():
            self.spans.append((phase, torch.cuda.max_memory_allocated(), -1))
        else:
            self.spans.append((phase, started, time.time_ns()))

    def close_at(self, owner: Any, function: str) -> None:
        """Nothing counts from the first call of this on."""
        inner = getattr(owner, function)

        def closing(*arguments: Any, **named: Any) -> Any:
            self.closed = True
            return inner(*arguments, **named)

        setattr(owner, function, closing)

    def peaks(self, live: list[tuple[int, int]]) -> dict[str, int]:
        """The most bytes alive in any span of each phase; live: bytes from a moment on, in order."""
        found: dict[str, int] = {}
        for phase, started, ended in self.spans:
            most = started if ended < 0 else most_between(live, started, ended)
            found[phase] = max(found.get(phase, 0), most)
        return found


def most_between(live: list[tuple[int, int]], started: int, ended: int) -> int:
    """The most that was alive between two moments."""
    before = [bytes_ for moment, bytes_ in live if moment <= started][-1:]
    return max([*before, *(bytes_ for moment, bytes_ in live if started < moment <= ended)], default=0)


def watch_stage(stage: str) -> Windows:
    """Spans of the phases that the planner names."""
    windows = Windows()
    if stage in ("sft", "reward"):
        windows.watch(training, "optimise", "step")
        windows.close_at(training, "save")
    if stage == "sft":
        windows.watch(sft.Evaluation, "_summaries", "summaries")
    if stage == "ppo":
        windows.watch(BuiltinEngine, "generate", "rollouts")
        windows.watch(ppo, "optimise", "step")
        windows.close_at(ppo, "save")
    if stage == "evaluate":
        windows.watch(BuiltinEngine, "generate", "summaries")
    if stage in ("prepare", "ppo", "evaluate"):
        windows.watch(Scorer, "score", "scores")
    return windows


def run_child(case: Case, run_dir: Path) -> dict[str, int]:
    """Run the case's stage here; the peak of each phase, in bytes."""
    announce_device()
    transformers_logging.disable_progress_bar()
    config, windows = settings(case, run_dir.parent), watch_stage(case.stage)
    stage = StageDir(run_dir, case.stage)
    with letting_go_here(), profile(profile_memory=True) as told, all_processes(config.runtime):
        RUNS[case.stage](config, stage, StopSignal())
    live, now = [], 0
    for moment, change in memory_events(told):
        now += change
        live.append((moment, now))
    return windows.peaks(live)


@contextmanager
def letting_go_here() -> Iterator[None]:
    """Let no other thread be the last to hold a tensor: what it gives back, the profiler does not hear of."""
    wait = torch.distributed.Work.wait

    def wait_longer(work: Any, *arguments: Any) -> Any:
        done = wait(work, *arguments)
        time.sleep(WAIT_SECONDS)
        return done

    hashing = patch.object(weight_reading._HashingBehind, "add", lambda self, piece: self.digest.update(piece))
    with hashing, patch.object(torch.distributed.Work, "wait", wait_longer):
        yield


def memory_events(told: Any) -> list[tuple[int, int]]:
    """When how many bytes were taken, or given back if negative, in order; of the CPU's allocator."""
    events = told.kineto_results.events()
    return sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")


def planned(case: Case, folder: Path) -> dict[str, int]:
    """Bytes by phase, as the planner has them; the moments of a step are one phase here."""
    config, device = settings(case, folder), "cuda" if torch.cuda.is_available() else "cpu"
    section = getattr(config, case.stage)
    strategy = read_strategy(getattr(section, "deepspeed", None), key=f"{case.stage}.deepspeed")
    base = folder / "run" / "fetch" / "final" / "base"
    need = NEEDS[case.stage](Setting(config, read_shape(base), strategy, 1, case.processes, device))
    found: dict[str, int] = {}
    for phase in need.phases:
        name = MEASURED_AS.get(phase.name, "step")
        found[name] = max(found.get(name, 0), phase.total)
    return found


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Run a case in a process of its own; rank 0's peaks."""
    run_dir, output = folder / "run", folder / "peaks.json"
    make_run(run_dir)
    if (run_dir / case.stage).exists():  # what it published for the others is not its own beginning
        (run_dir / case.stage).rename(folder / "published")
    command = [sys.executable, "-m"]
    if case.processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}", "-m"]
    spec = json.dumps({"stage": case.stage, "changes": case.changes, "processes": case.processes})
    command += ["tests.benchmarks.plan", "--child", spec, "--run-dir", str(run_dir), "--json", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.stage} {case.name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    peaks: dict[str, int] = json.loads(output.read_text(encoding="utf-8"))
    return peaks


def main() -> None:
    """Measure the cases and print a row for each phase of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="cases whose stage and name contain this")
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        peaks = run_child(Case(**json.loads(options.child)), options.run_dir)
        if int(os.environ.get("RANK", "0")) == 0:
            options.json.write_text(json.dumps(peaks), encoding="utf-8")
        return
    lines = ["| stage | settings | phase | planned MB | measured MB | ratio |", "| --- " * 6 + "|"]
    print("\n".join(lines))
    for case in CASES:
        if options.only and options.only not in f"{case.stage} {case.name}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            peaks = measure(case, Path(folder))
            plan = planned(case, Path(folder))
        for phase in peaks.keys() & plan.keys():
            ours, theirs = plan[phase], peaks[phase]
            row = f"{ours / 1e6:.0f} | {theirs / 1e6:.0f} | {ours / theirs:.2f}"
            lines.append(f"| {case.stage} | {case.name} | {phase} | {row} |")
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
