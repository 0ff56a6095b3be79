"""Starts `rlhf launch` as a user or a Job does; where the stage does not matter, a few lines run in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tests.conftest import REPOSITORY

STAND_IN = """
import os
if "RANK" in os.environ and "RLHF_AGENT_PID" in os.environ:
    import json, signal, sys, threading, time
    import rlhf.__main__
    rank, attempt = int(os.environ["RANK"]), rlhf.__main__.attempt
    def wait_until(sign):
        while not os.path.exists(sign):
            time.sleep(0.02)
    def stage(arguments):
        folder = os.environ["SIGNS"]
{body}
    rlhf.__main__.attempt = stage
"""


class Launcher:
    """Starts `rlhf launch`, and ends at the end of its block what still runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[str]]()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF_", "OMP_", "JOB_"))}
        self.environment |= {"SIGNS": str(folder), "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.communicate()

    def stage_is(self, body: str) -> None:
        """Have the processes run these lines, which know `rank` and `folder`, and return exit code and line."""
        (self.folder / "site").mkdir()
        indented = textwrap.indent(textwrap.dedent(body), " " * 8)
        (self.folder / "site" / "sitecustomize.py").write_text(STAND_IN.format(body=indented))
        self.environment["PYTHONPATH"] = os.pathsep.join([str(self.folder / "site"), str(REPOSITORY)])

    def start(self, *arguments: str, within: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        """A launcher that runs by now; `within` is a command that runs it, `ip netns exec NAME` say."""
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "rlhf", "launch", *arguments],
            cwd=REPOSITORY,
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        """The exit code, and what is on stderr but the log."""
        return ended(self.start(*arguments, **environment))

    def sees(self, sign: str, count: int = 1) -> None:
        """Wait until the processes have left so many signs."""
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob(sign))) < count:
            assert time.monotonic() < deadline, f"no {sign}"
            time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, log = process.communicate(timeout=90)
    return process.returncode, [line for line in log.splitlines() if not line.startswith("{")]


def options(folder: Path, *more: str) -> tuple[str, ...]:
    settings = ("runtime.device=cpu", "sft.batch_size=12", "sft.micro_batch_size=1", *more)
    return ("--config", "demo", "--runs-dir", str(folder), *(word for one in settings for word in ("--set", one)))


def two_nodes(node: int, port: int) -> dict[str, str]:
    """What a Job of two pods sets."""
    return {"RLHF_NODES": "2", "JOB_COMPLETION_INDEX": str(node), "RLHF_RENDEZVOUS": f"localhost:{port}"}


def facts(log: str) -> list[str]:
    """What the processes logged."""
    return [json.loads(line)["message"] for line in log.splitlines() if line.startswith("{")]
