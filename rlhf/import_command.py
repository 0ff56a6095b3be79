"""`rlhf import-model`: options and what they set going. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.console import Parser
from rlhf.errors import UsageError

if TYPE_CHECKING:
    from rlhf.config import Config

USUAL_CONFIG = "gptj-6b"
STAGES_OF = {"policy": ("ppo", "sft"), "reward": ("reward",)}
"""The stages that a kind of model can stand for, the default first."""

DESCRIPTION = """\
Make a stage of a run out of a GPT-J that trlX's summarize example has published, so that the service, `evaluate` and
the stages after it use the model as if it had been trained here. Nothing but tensors is read from pickles.
"""
EXAMPLES = """\
examples:
  rlhf import-model --run published --kind policy --tokenizer EleutherAI/gpt-j-6b \\
    CarperAI/openai_summarize_tldr_ppo
  rlhf import-model --run published --kind reward rm_checkpoint/pytorch_model.bin
  APP_RUN_DIR=runs/published APP_MODELS=ppo python -m app

docs/importing.md says what is checked, and how to evaluate the models.
"""


def add_import_model(commands: argparse._SubParsersAction[Parser], parents: Sequence[Parser]) -> None:
    """Add the command; parents are the parsers with --run, --runs-dir, --debug, --config and --set."""
    parser = commands.add_parser(
        "import-model",
        help="take a policy or a reward model that others have trained into a run",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=list(parents),
    )
    parser.add_argument(
        "path", metavar="PATH", help="a directory, a weights file (pytorch_model.bin, *.safetensors), or a Hub name"
    )
    parser.add_argument(
        "--kind",
        required=True,
        choices=STAGES_OF,
        help="policy: transformer.* and lm_head.*; reward: transformer.* and v_head.weight",
    )
    parser.add_argument(
        "--stage", choices=STAGES_OF["policy"], help="the stage that a policy stands for (default: ppo)"
    )
    parser.add_argument(
        "--config-from",
        type=Path,
        metavar="DIR",
        help="a directory whose config.json tells the shape (default: PATH's; GPT-J-6B needs none)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR|NAME",
        help="a directory or a Hub name (default: PATH's, else the one that the run has)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: as they are)"
    )
    parser.set_defaults(command=command_import_model)


def command_import_model(options: argparse.Namespace) -> int:
    """Import one model and say what can be done with it next."""
    if options.kind == "reward" and options.stage:
        raise UsageError(f"--stage {options.stage} is for policies; leave it out with --kind reward")
    stage = options.stage or STAGES_OF[options.kind][0]
    if all(name is None or Path(name).exists() for name in (options.path, options.tokenizer)):
        os.environ["HF_HUB_OFFLINE"] = "1"  # a library that asks the Hub all the same must not hang
    from rlhf.checkpoint import run_directory
    from rlhf.import_model import Source, import_model
    from rlhf.telemetry import configure_logging

    configure_logging(debug=options.debug)
    run_dir = run_directory(options.runs_dir, options.run)
    source = Source(
        kind=options.kind,
        path=options.path,
        config_from=options.config_from,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
    )
    final = import_model(source, stage, read_config(options, run_dir), run_dir)
    sys.stdout.write(f"{final} holds the {options.kind}; `python -m rlhf status --run {options.run}` shows the run\n")
    return 0


def read_config(options: argparse.Namespace, run_dir: Path) -> Config:
    """The configuration that the options, the environment or the run name; else that of GPT-J-6B."""
    from rlhf.pipeline import saved_config
    from rlhf.presets import load_config

    source = options.config or os.environ.get("RLHF_CONFIG") or saved_config(run_dir) or USUAL_CONFIG
    return load_config(str(source), options.set)
