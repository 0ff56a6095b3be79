"""PPO by our engine and by trlX: `python -m tests.benchmarks.trlx_ppo --layers 6 --hidden 256`.

The same policy, reward model, prompts and hyper-parameters, each engine in a process of its own, one after the other.
The times are those that both write into metrics.jsonl: sampling, scoring, experience (log-probabilities of policy and
reference, values) and training, an iteration. On a CPU they are seconds of the process's own CPU time, to which other
programs on the machine add nothing; with one thread and nothing else running that is the time by the clock. Of each
phase the quickest of all iterations but the first counts. Each process's greatest resident set counts what its
libraries take, for trlX ray, too.

The policy has random weights and writes printable ASCII, which trlX's decoding and tokenising again leaves as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf.checkpoint import StageDir
from rlhf.config import Config, TinyModelConfig
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.models import create_tiny_gptj, reward_model_from_policy
from rlhf.stopping import StopSignal
from rlhf.telemetry import configure_logging, read_metrics
from tests.tiny_run import byte_tokenizer

PROGRAM = "tests.benchmarks.trlx_ppo"
ENGINES = ("builtin", "trlx")
PHASES = {"generate": "rollout", "score": "score", "forward": "experience", "train": "train"}
ABSENT = "trlX is not installed, so only our engine is measured; docs/trlx.md says how to install it"
NEVER = -1e4


def printable_policy(options: argparse.Namespace, *, seed: int) -> PreTrainedModel:
    """A GPT-J with random weights whose bias leaves printable ASCII only; it never ends by itself."""
    tokenizer = byte_tokenizer()
    shape = TinyModelConfig(layers=options.layers, hidden=options.hidden, heads=4, rotary_dim=16)
    model = create_tiny_gptj(
        shape,
        positions=options.prompt + options.response,
        vocab_size=options.vocabulary,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=seed,
    )
    printable = tokenizer("".join(map(chr, range(32, 127))))["input_ids"]
    with torch.no_grad():
        model.lm_head.bias.fill_(NEVER)
        model.lm_head.bias[printable] = 0.0
    return model


def prepare(run_dir: Path, options: argparse.Namespace) -> None:
    """What PPO needs: a policy, a reward model, and prompts of half to all of `--prompt` letters."""
    tokenizer = byte_tokenizer()
    with StageDir(run_dir, "sft").publish(1, final=True) as directory:
        printable_policy(options, seed=1).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    with StageDir(run_dir, "reward").publish(1, final=True) as directory:
        reward_model_from_policy(run_dir / "sft" / "final", seed=2).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    chances = torch.Generator().manual_seed(1)
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        for split in ("train", "valid"):
            rows = []
            for number in range(4 * options.rollouts):
                length = int(torch.randint(options.prompt // 2, options.prompt + 1, (), generator=chances))
                letters = torch.randint(97, 123, (length,), generator=chances).tolist()
                ids = tokenizer("".join(map(chr, letters)))["input_ids"]
                rows.append(EnvironmentRow(f"{split}-{number}", ids, 0, 0.0))
            write_environment(directory, split, rows)


def settings(options: argparse.Namespace) -> Config:
    """The hyper-parameters of both, those of trlX's summarize example where size does not matter."""
    ppo = {
        "iterations": options.iterations,
        "unfrozen_layers": max(options.layers // 3, 1),
        "rollouts_per_iteration": options.rollouts,
        "rollout_chunk": 16,
        "inner_epochs": 4,
        "minibatch_size": 16,
        # trlX takes a batch as it is. Ours in halves: the same gradient, from what stays nearer to the processor.
        "micro_batch_size": 16 if options.engine == "trlx" else 8,
        "eval_every_iterations": options.iterations + 1,
        "eval_posts": 4,
        "optimizer": {"learning_rate": 5e-6, "final_learning_rate": 5e-6, "warmup_steps": 0},
    }
    sections = {
        "prompt": {"max_prompt_tokens": options.prompt, "max_response_tokens": options.response},
        "runtime": {"device": options.device, "tensorboard": False, "threads": options.threads},
        "ppo": ppo,
    }
    return Config.model_validate(sections)


def count_cpu_time() -> None:
    """Have every clock of this process tell its CPU time; for a child, before an engine is imported."""
    for clock in ("time", "perf_counter", "monotonic"):
        setattr(time, clock, time.process_time)


def run_engine(engine: str, run_dir: Path, options: argparse.Namespace) -> dict[str, float]:
    """In this process: an engine's quickest phases in seconds, and the process's greatest resident set in MB."""
    stage = StageDir(run_dir, "ppo")
    if engine == "trlx":
        from rlhf.trlx.train import run
    else:
        from rlhf.stages.ppo import run
    run(settings(options), stage, StopSignal())
    lines = [line for line in read_metrics(stage.path / "metrics.jsonl") if line["step"] > 1]
    found = {phase: min(line[f"time/{key}_seconds"] for line in lines) for phase, key in PHASES.items()}
    found["iteration"] = sum(found.values())
    found["samples/s"] = options.rollouts / found["iteration"]
    found["tokens"] = statistics.mean(line["ppo/response_tokens"] for line in lines)
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def measure(
    options: argparse.Namespace, arguments: list[str], *, program: str = PROGRAM
) -> dict[str, dict[str, float]]:
    """Each engine that is there in a child that runs the program; arguments are the command line's."""
    engines = [engine for engine in ENGINES if engine != "trlx" or importlib.util.find_spec("trlx")]
    found: dict[str, dict[str, float]] = {}
    for engine in engines:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            child = [*arguments, "--engine", engine, "--json", str(result)]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
            if options.device == "cpu":
                environment["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no GPU
            subprocess.run([sys.executable, "-m", program, *child], env=environment, check=True)
            found[engine] = json.loads(result.read_text(encoding="utf-8"))
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """A line a quantity: ours, trlX's, and how many times ours trlX's is."""
    lines = [f"{'':<12}{'ours':>10}{'trlX':>10}{'trlX/ours':>11}"]
    for name, ours in found["builtin"].items():
        cells = f"{name:<12}{ours:>10.3f}"
        if "trlx" in found:
            cells += f"{found['trlx'][name]:>10.3f}{found['trlx'][name] / ours:>11.2f}"
        lines.append(cells)
    return "\n".join(lines)


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog=f"python -m {program}")
    for name, default in (("layers", 4), ("hidden", 128), ("vocabulary", 4096), ("prompt", 128), ("response", 48)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--rollouts", type=int, default=64, help="summaries an iteration")
    options.add_argument("--iterations", type=int, default=6, help="the first is not counted")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--json", type=Path, help="write the numbers there, too")
    options.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    return options


def run_here(run_dir: Path, options: argparse.Namespace) -> dict[str, float]:
    """In this process: what `options.engine` takes."""
    prepare(run_dir, options)
    return run_engine(options.engine, run_dir, options)


def be_child(options: argparse.Namespace, run_here: Callable[[Path, argparse.Namespace], dict[str, float]]) -> None:
    """Do one engine's part in a run of its own, and leave the numbers where the parent looks for them."""
    configure_logging(quiet=True)
    if options.device == "cpu":
        count_cpu_time()
    with tempfile.TemporaryDirectory() as folder:
        found = run_here(Path(folder) / "run", options)
    options.json.write_text(json.dumps(found), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.engine:
        be_child(options, run_here)
        return
    results = measure(options, arguments)
    print(table(results))
    if "trlx" not in results:
        print(ABSENT)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
