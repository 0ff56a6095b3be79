"""The service: `python -m app` serves; `python -m app --help` lists what else there is.

Nothing heavy is imported before the settings are known to be right.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rlhf import __version__
from rlhf.console import Parser, report_failure
from rlhf.errors import RlhfError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit codes are those of `python -m rlhf`."""
    options = None
    try:
        options = build_parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except RlhfError as error:
        if options is not None and options.debug:
            traceback.print_exc()
        report_failure(f"app: {error}")
        return error.exit_code


def build_parser() -> Parser:
    """All commands; none means: serve."""
    parser = Parser(
        prog="app", description="Summaries and scores over HTTP. APP_* variables set it up: `app settings` lists them."
    )
    parser.add_argument("--version", action="version", version=f"app {__version__}")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    parser.set_defaults(command=command_serve)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the run that APP_RUN_DIR names (the default)")
    serve.set_defaults(command=command_serve)
    settings = commands.add_parser("settings", help="print the table of all settings")
    settings.set_defaults(command=command_settings)
    key = commands.add_parser("new-key", help="make an API key and its line for APP_API_KEYS_FILE")
    key.add_argument("name", metavar="NAME", help="who gets it, for the log; 1 to 64 of A-Z a-z 0-9 . _ -")
    key.set_defaults(command=command_new_key)
    return parser


def command_serve(options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until the server listens for signals nothing is accepted, so there is nothing to finish.
        signal.signal(number, lambda number, frame: sys.exit(0))
    from app.read_ahead import read_ahead
    from app.server import listen
    from app.settings import Settings

    settings = Settings.from_environment()
    with listen(settings.host, settings.port) as listener:
        read_ahead(settings.run_dir, (*settings.models, "reward"))
        with _collecting_no_garbage():
            from rlhf.runtime import announce_device

            announce_device()
            from prometheus_client import disable_created_metrics

            from app.logs import configure_service_logging
            from app.main import create_app
            from app.server import run
            from app.service import Service

        configure_service_logging(settings.log_level)
        disable_created_metrics()
        service = Service(settings)
        run(create_app(settings, service), service, settings, listener)
    return 0


@contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """For imports, whose many objects all stay: looking through them again and again takes a sixth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def command_settings(options: argparse.Namespace) -> int:
    """Print the page docs/service-settings.md."""
    from app.settings_reference import settings_markdown

    sys.stdout.write(settings_markdown())
    return 0


def command_new_key(options: argparse.Namespace) -> int:
    """Print the line for the keys file, fit for `>>`; the key itself, which is kept nowhere, goes to stderr."""
    from app.keys import new_key

    key, line = new_key(options.name)
    sys.stderr.write(f"the key, shown only now: {key}\n")
    sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
