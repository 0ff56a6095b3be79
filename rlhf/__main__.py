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
from rlhf.cluster.commands import add_commands
from rlhf.console import Parser, ignore_signals, report_failure
from rlhf.errors import PrerequisiteError, RlhfError, StopRequested, UsageError
from rlhf.import_command import add_import_model
from rlhf.launcher.layout import launch_options
from rlhf.launcher.outcome import UNFORESEEN
from rlhf.plan_command import add_plan_command
from rlhf.trlx.import_command import add_import_trlx

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


def run() -> int:
    """The entry point: `main`, and an exit code that no late signal changes."""
    try:
        code = main()
    except KeyboardInterrupt:  # a second signal, while the first was being told
        code = StopRequested.exit_code
    ignore_signals()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code tells a Job what happened (the README lists them)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until somebody listens who knows better
    code, line = attempt(sys.argv[1:] if arguments is None else arguments)
    if line:
        report_failure(f"rlhf: {line}")
    return code


def attempt(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command; its exit code, and the line for the user when it failed."""
    debug = "--debug" in arguments
    try:
        options = build_parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options), ""
    except RlhfError as error:
        if debug:
            traceback.print_exc()
        return error.exit_code, str(error)
    except BrokenPipeError:
        # The reader of our output has left, `| head` say; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except KeyboardInterrupt:
        return StopRequested.exit_code, "interrupted; run the same command again to continue"
    except Exception as error:
        # Nobody foresaw it, so the traceback is worth having; Kubernetes still shows the line.
        traceback.print_exc()
        return UNFORESEEN, f"{type(error).__name__}: {error}"


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="rlhf", description="Learning to summarise from human feedback.")
    parser.add_argument("--version", action="version", version=f"rlhf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = Parser(add_help=False)
    common.add_argument(
        "--run",
        default=os.environ.get("RLHF_RUN", "demo"),
        metavar="NAME",
        help="name of the run (default: $RLHF_RUN or demo)",
    )
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
    launch = commands.add_parser(
        "launch", help="one stage, on many processes or nodes", parents=[common, settings, launch_options()]
    )
    launch.add_argument("stage", choices=STAGE_HELP, metavar="STAGE", help="the stage to run")
    launch.set_defaults(command=command_launch)
    check = commands.add_parser("check", help="whether one stage could start here", parents=[common, settings])
    check.add_argument("stage", choices=STAGE_HELP, metavar="STAGE", help="the stage to check for")
    check.add_argument("--gpus", type=int, metavar="N", help="GPUs that have to be visible (default: $RLHF_GPUS)")
    check.set_defaults(command=command_check)
    run = commands.add_parser("run", help="all stages in order, skipping what is finished", parents=[common, settings])
    run.add_argument("--from", dest="first", choices=STAGE_HELP, metavar="STAGE", help="begin with this stage")
    run.add_argument("--until", dest="last", choices=STAGE_HELP, metavar="STAGE", help="end with this stage")
    run.set_defaults(command=command_run)
    status = commands.add_parser("status", help="how far each stage of a run is", parents=[common])
    status.set_defaults(command=command_status)
    verify = commands.add_parser(
        "verify", help="hold all that a run has published against what was written down then", parents=[common]
    )
    verify.add_argument("name", nargs="?", metavar="RUN", help="name of the run (default: that of --run)")
    verify.add_argument("--repair", action="store_true", help="move what is damaged aside; deletes nothing")
    verify.set_defaults(command=command_verify)
    report = commands.add_parser("report", help="write the HTML report of a run", parents=[common])
    report.set_defaults(command=command_report)
    compare = commands.add_parser("compare", help="what PPO gained, over several runs", parents=[common])
    compare.add_argument("runs", nargs="+", metavar="RUN", help="names of evaluated runs")
    compare.set_defaults(command=command_compare)
    config = commands.add_parser("config", help="print the resolved configuration", parents=[common, settings])
    config.add_argument("--markdown", action="store_true", help="print the table of all settings instead")
    config.set_defaults(command=command_config)
    add_plan_command(commands, [common, settings])
    add_import_model(commands, [common, settings])
    add_import_trlx(commands)
    add_commands(commands, tuple(STAGE_HELP))
    return parser


def command_stage(options: argparse.Namespace) -> int:
    """Run one stage in this process."""
    from rlhf.stopping import StopSignal

    stop = StopSignal()
    stop.install()
    from rlhf.checkpoint import run_directory
    from rlhf.pipeline import STAGES

    config, run_dir = read_config(options), run_directory(options.runs_dir, options.run)
    if options.stage != "fetch":
        # Later stages have all they need on the volume; a library that asks the Hub all the same must not hang.
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from rlhf.processes import is_first_process
        from rlhf.running import run_stage
        from rlhf.runtime import all_processes, announce_device
        from rlhf.telemetry import configure_logging

        announce_device()
        configure_logging(debug=options.debug, quiet=not is_first_process())
        with all_processes(config.runtime):
            run_stage(next(stage for stage in STAGES if stage.name == options.stage), config, run_dir, stop)
    except Exception as error:
        if stop.interrupted:  # whatever a library made of it
            raise KeyboardInterrupt from error
        raise
    return 0


def command_launch(options: argparse.Namespace) -> int:
    """Run one stage on the processes and nodes that the options or the environment name."""
    from rlhf.checkpoint import run_directory
    from rlhf.launcher.launch import launch
    from rlhf.telemetry import configure_logging

    configure_logging(debug=options.debug, libraries=False)
    config, run_dir = read_config(options), run_directory(options.runs_dir, options.run)
    return launch(options, config, run_dir, stage_arguments(options.stage, options), run_here=command_stage)


def command_check(options: argparse.Namespace) -> int:
    """Say whether a stage could start, within seconds and without torch."""
    from rlhf.checkpoint import run_directory
    from rlhf.preflight import check

    run_dir = run_directory(options.runs_dir, options.run)
    for line in check(options.stage, read_config(options), run_dir, gpus=options.gpus):
        print(line, flush=True)
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
    todo = [name for name in STAGE_NAMES[first : last + 1] if not StageDir(run_dir, name).is_whole()]
    for number, name in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {name}: {STAGE_HELP[name]}", file=sys.stderr)
        if code := run_process([sys.executable, "-m", "rlhf", *stage_arguments(name, options)]):
            return code
    if not todo:
        print(f"every stage of {run_dir} is done", file=sys.stderr)
    if StageDir(run_dir, "evaluate").is_final():
        print_results(run_dir)
    return 0


def stage_arguments(name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of one stage's command, with the options that were given."""
    command = [name, "--run", options.run, "--runs-dir", str(options.runs_dir)]
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


def command_verify(options: argparse.Namespace) -> int:
    """Print a line for each published directory and each problem of a run; 0: all is good, 65: it is not."""
    from rlhf.audit import verify_run
    from rlhf.checkpoint import run_directory
    from rlhf.repair import repair_run

    run_dir = run_directory(options.runs_dir, options.name or options.run)
    return (repair_run if options.repair else verify_run)(run_dir, say=lambda line: print(line, flush=True))


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

    source = options.config or os.environ.get("RLHF_CONFIG")
    if not source:
        source = str(saved_config(run_directory(options.runs_dir, options.run)) or "demo")
    return load_config(source, options.set)


def print_results(run_dir: Path) -> None:
    """The table of the evaluation, and where the report is."""
    from rlhf.results import read_results, results_table

    print(results_table(read_results(run_dir)))
    print(f"\nreport: {run_dir / 'report' / 'index.html'}")


if __name__ == "__main__":
    sys.exit(run())
