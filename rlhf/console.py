"""What every command line of the project does alike: mistakes and failures end in one line and an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from rlhf.errors import UsageError

LAST_WORDS = "RLHF_LAST_WORDS"
"""The environment variable that names the file for them, in a process that a launcher has started."""
TERMINATION_LOG = Path("/dev/termination-log")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes end as UsageError, with exit code 64."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def ignore_signals() -> None:
    """From here on SIGTERM and SIGINT change nothing: the exit code stands.

    At its own end the interpreter puts their usual handlers back, which would replace it, unless they are ignored.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def report_failure(line: str) -> None:
    """Say it in one line on stderr, and where Kubernetes and a launcher read why a process ended."""
    line = " ".join(line.split())
    sys.stderr.write(f"{line}\n")
    if words := os.environ.get(LAST_WORDS):
        Path(words).write_text(line, encoding="utf-8")
    if TERMINATION_LOG.exists() and os.access(TERMINATION_LOG, os.W_OK):
        TERMINATION_LOG.write_text(line[:4096], encoding="utf-8")
