"""`rlhf import-trlx CONFIG.yml`: a trlX configuration as one of ours, on stdout.

Nothing but the standard library is imported before the command runs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf.console import Parser


def add_import_trlx(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    meaning = "print a trlX configuration as one of ours"
    parser = commands.add_parser("import-trlx", help=meaning, description=f"{meaning}, with what has no counterpart.")
    parser.add_argument("path", type=Path, metavar="CONFIG.yml", help="a configuration of trlX: PPO or SFT")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that trlX was started on: its batch sizes are those of one (default: 1)",
    )
    parser.set_defaults(command=command_import_trlx)


def command_import_trlx(options: argparse.Namespace) -> int:
    """Print the translation."""
    from rlhf.trlx.yaml_import import imported

    sys.stdout.write(imported(options.path, processes=options.processes))
    return 0
