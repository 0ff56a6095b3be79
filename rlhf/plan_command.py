"""`rlhf plan`: its options, and what they set going.

Nothing but the standard library is imported before the command runs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.console import Parser
from rlhf.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from rlhf.config import Config
    from rlhf.memory_plan import Machine

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_plan_command(commands: argparse._SubParsersAction[Parser], parents: Sequence[Parser]) -> None:
    """Add `plan`; parents bring --run, --runs-dir, --config, --set and --debug."""
    plan = commands.add_parser(
        "plan",
        help="how much memory each stage needs, whether it fits, and what to change",
        description="Add up the memory of every stage, without torch and without weights. Exit code 0: the "
        "configuration fits; 78: it does not, and what to change is printed.",
        parents=list(parents),
    )
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of a node")
    plan.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of one GPU, as 80GB or 40GiB")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    plan.add_argument("--host-memory", metavar="SIZE", help="of a node, as 512GB (default: not checked)")
    plan.add_argument("--model", metavar="DIR|NAME", help="where the model's config.json is (default: the run's base)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=command_plan)


def command_plan(options: argparse.Namespace) -> int:
    """Print the plan; 0 when every stage fits as it is configured, 78 when one does not."""
    from rlhf.memory_advice import advise_run
    from rlhf.memory_plan import plan_run
    from rlhf.model_families import find_shape
    from rlhf.plan_text import as_json, as_text

    config = wanted_config(options)
    machine = wanted_machine(options, device="cpu" if config.runtime.device == "cpu" else "cuda")
    shape = find_shape(config, fetched_base(options, config), options.model)
    plans = plan_run(config, shape, machine)
    advice = advise_run(config, shape, machine, plans)
    if options.json:
        shown = json.dumps(as_json(config, shape, machine, plans, advice), indent=1)
    else:
        shown = "\n".join(as_text(config, shape, machine, plans, advice))
    sys.stdout.write(shown + "\n")
    return 0 if all(plan.fits for plan in plans) else ConfigError.exit_code


def wanted_config(options: argparse.Namespace) -> Config:
    """The configuration that the options, the environment or the run itself name."""
    from rlhf.checkpoint import run_directory
    from rlhf.pipeline import saved_config
    from rlhf.presets import load_config

    source = options.config or os.environ.get("RLHF_CONFIG")
    if not source:
        source = str(saved_config(run_directory(options.runs_dir, options.run)) or "demo")
    return load_config(source, options.set)


def fetched_base(options: argparse.Namespace, config: Config) -> Path | None:
    """The base model that the run has fetched, where it is the one that this configuration names."""
    from rlhf.checkpoint import run_directory
    from rlhf.pipeline import saved_config
    from rlhf.presets import load_config

    run_dir = run_directory(options.runs_dir, options.run)
    saved = saved_config(run_dir)
    if saved is None or load_config(str(saved)).model != config.model:
        return None
    return run_dir / "fetch" / "final" / "base"


def wanted_machine(options: argparse.Namespace, *, device: str) -> Machine:
    """The nodes that the options describe. Raises UsageError for counts below 1 and for sizes without a unit."""
    from rlhf.memory_plan import Machine

    for name in ("gpus", "nodes"):
        if getattr(options, name) < 1:
            raise UsageError(
                f"--{name} {getattr(options, name)}: give 1 or more; on the CPU a process stands for a GPU"
            )
    host = None if options.host_memory is None else parse_size(options.host_memory, option="--host-memory")
    gpu = parse_size(options.gpu_memory, option="--gpu-memory")
    return Machine(options.nodes, options.gpus, gpu, host, device)


def parse_size(text: str, *, option: str) -> int:
    """Bytes of a size such as `80GB` (10^9 bytes) or `80GiB` (2^30). Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", text.strip())
    unit = UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not float(match.group(1)):
        number = re.match(r"[\d.]*", text.strip())
        example = f"{number.group() if number and number.group() else 80}GB"
        raise UsageError(f"{option} {text}: give a size with its unit, {example} say (MB, GB, TB, MiB, GiB, TiB)")
    return round(float(match.group(1)) * unit)
