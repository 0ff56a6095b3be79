"""The commands: `python -m rlhf --help`.

Nothing heavy is imported before a command needs it, so that help answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rlhf import __version__
from rlhf.console import Parser, report_failure
from rlhf.errors import PrerequisiteError, RlhfError, UsageError

if TYPE_CHECKING:
    from rlhf.config import Config

STAGE_HELP = {
    "fetch": "bring posts, comparisons and the base model; the only stage that needs the network",
    "sft": "fine-tune the base model on posts and their summaries",
    "reward": "train the reward model on comparisons",
    "prepare": "truncate PPO's prompts and score their reference summaries",
    "ppo": "align the policy with the reward model",
    "evaluate": "compare SFT, PPO, reference and lead on the test posts",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code tells a Job what happened (the README lists them)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        options = build_parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except RlhfError as error:
        if debug:
            traceback.print_exc()
        report_failure(f"rlhf: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left, `| head` say; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        report_failure("rlhf: interrupted; run the same command again to continue")
        return 75


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="rlhf", description="Learning to summarise from human feedback.")
    parser.add_argument("--version", action="version", version=f"rlhf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = Parser(add_help=False)
    common.add_argument("--run", default="demo", metavar="NAME", help="name of the run (default: demo)")
    common.add_argument(
        "--runs-dir",
        type=Path,
        default=Path(os.environ.get("RLHF_RUNS_DIR", "runs")),
        metavar="DIR",
        help="where runs live (default: $RLHF_RUNS_DIR or ./runs)",
    )
    common.add_argument("--debug", action="store_true", help="more log, and tracebacks")
    settings = Parser(add_help=False)
    settings.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="a preset or a YAML file (default: $RLHF_CONFIG, else what the run began with, else demo)",
    )
    settings.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change one setting; repeatable"
    )

    for name, meaning in STAGE_HELP.items():
        stage = commands.add_parser(name, help=meaning, description=meaning, parents=[common, settings])
        stage.set_defaults(command=command_stage, stage=name)
    run = commands.add_parser("run", help="all stages in order, skipping what is finished", parents=[common, settings])
    run.add_argument("--from", dest="first", choices=STAGE_HELP, metavar="STAGE", help="begin with this stage")
    run.add_argument("--until", dest="last", choices=STAGE_HELP, metavar="STAGE", help="end with this stage")
    run.set_defaults(command=command_run)
    status = commands.add_parser("status", help="how far each stage of a run is", parents=[common])
    status.set_defaults(command=command_status)
    report = commands.add_parser("report", help="write the HTML report of a run", parents=[common])
    report.set_defaults(command=command_report)
    compare = commands.add_parser("compare", help="what PPO gained, over several runs", parents=[common])
    compare.add_argument("runs", nargs="+", metavar="RUN", help="names of evaluated runs")
    compare.set_defaults(command=command_compare)
    config = commands.add_parser("config", help="print the resolved configuration", parents=[common, settings])
    config.add_argument("--markdown", action="store_true", help="print the table of all settings instead")
    config.set_defaults(command=command_config)
    return parser


def command_stage(options: argparse.Namespace) -> int:
    """Run one stage in this process."""
    from rlhf.checkpoint import run_directory
    from rlhf.pipeline import STAGES, run_stage

    config, run_dir = read_config(options), run_directory(options.runs_dir, options.run)
    from rlhf.runtime import StopSignal, announce_device
    from rlhf.telemetry import configure_logging

    announce_device()
    configure_logging(debug=options.debug)
    if options.stage != "fetch":
        # Later stages have all they need on the volume; a library that asks the Hub all the same must not hang.
        os.environ["HF_HUB_OFFLINE"] = "1"
    stop = StopSignal()
    stop.install()
    run_stage(next(stage for stage in STAGES if stage.name == options.stage), config, run_dir, stop)
    return 0


def command_run(options: argparse.Namespace) -> int:
    """Run the stages, each in a process of its own; the first that fails ends it with its exit code."""
    from rlhf.checkpoint import StageDir, run_directory
    from rlhf.pipeline import STAGE_NAMES, check_settings

    first = STAGE_NAMES.index(options.first or STAGE_NAMES[0])
    last = STAGE_NAMES.index(options.last or STAGE_NAMES[-1])
    if first > last:
        raise UsageError(f"--from {options.first} comes after --until {options.last}")
    config, run_dir = read_config(options), run_directory(options.runs_dir, options.run)
    check_settings(config, run_dir)
    todo = [name for name in STAGE_NAMES[first : last + 1] if not StageDir(run_dir, name).is_final()]
    for number, name in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {name}: {STAGE_HELP[name]}", file=sys.stderr)
        if code := run_process(stage_command(name, options)):
            return code
    if not todo:
        print(f"every stage of {run_dir} is done", file=sys.stderr)
    if StageDir(run_dir, "evaluate").is_final():
        print_results(run_dir)
    return 0


def stage_command(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of one stage with the options that `run` was given."""
    command = [sys.executable, "-m", "rlhf", name, "--run", options.run, "--runs-dir", str(options.runs_dir)]
    if options.config:
        command += ["--config", options.config]
    for change in options.set:
        command += ["--set", change]
    return command + (["--debug"] if options.debug else [])


def run_process(command: list[str]) -> int:
    """Run a child to its end, handing it the signals that come; returns its exit code."""
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def command_status(options: argparse.Namespace) -> int:
    """Print a line a stage."""
    from rlhf.checkpoint import run_directory
    from rlhf.status import status_table

    print(status_table(run_directory(options.runs_dir, options.run)))
    return 0


def command_report(options: argparse.Namespace) -> int:
    """Write the report from whatever is there."""
    from rlhf.checkpoint import run_directory

    run_dir = run_directory(options.runs_dir, options.run)
    if not run_dir.is_dir():
        raise PrerequisiteError(f"{run_dir} does not exist; run `python -m rlhf run --run {options.run}` first")
    from rlhf.report import write_report

    print(write_report(run_dir))
    return 0


def command_compare(options: argparse.Namespace) -> int:
    """Print the table over several runs."""
    from rlhf.checkpoint import run_directory
    from rlhf.results import comparison_table

    print(comparison_table([run_directory(options.runs_dir, name) for name in options.runs]))
    return 0


def command_config(options: argparse.Namespace) -> int:
    """Print the resolved configuration, or the table of all settings."""
    if options.markdown:
        from rlhf.config_reference import settings_markdown

        print(settings_markdown(), end="")
    else:
        print(read_config(options).to_yaml(), end="")
    return 0


def read_config(options: argparse.Namespace) -> Config:
    """The configuration that the options, the environment or the run itself name."""
    from rlhf.checkpoint import run_directory
    from rlhf.pipeline import saved_config
    from rlhf.presets import load_config

    saved = saved_config(run_directory(options.runs_dir, options.run))
    source = options.config or os.environ.get("RLHF_CONFIG") or (str(saved) if saved else "demo")
    return load_config(source, options.set)


def print_results(run_dir: Path) -> None:
    """The table of the evaluation, and where the report is."""
    from rlhf.results import read_results, results_table

    print(results_table(read_results(run_dir)))
    print(f"\nreport: {run_dir / 'report' / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
