"""A point: one system call of an action fails one way, and what is found afterwards."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import PERMANENT_CODES, RlhfError, StorageError
from tests.faults.trap import Call, Journal, Kind, Mode, Plan, Trap

HANGS_AFTER_SECONDS = 60


@dataclass(frozen=True)
class Fault:
    """One way to fail; power: what was not synced by then is lost, too."""

    name: str
    mode: Mode
    number: int = 0
    lasting: bool = False
    power: bool = False


FAULTS = (
    Fault("ENOSPC", Mode.FAIL, errno.ENOSPC),
    Fault("EIO", Mode.FAIL, errno.EIO),
    Fault("EROFS", Mode.FAIL, errno.EROFS),
    Fault("ENOSPC from then on", Mode.FAIL, errno.ENOSPC, lasting=True),
    Fault("EIO from then on", Mode.FAIL, errno.EIO, lasting=True),
    Fault("EROFS from then on", Mode.FAIL, errno.EROFS, lasting=True),
    Fault("half a write, then ENOSPC", Mode.SHORT),
    Fault("killed before it", Mode.DIE_BEFORE),
    Fault("power lost after it", Mode.DIE_AFTER, power=True),
)


@dataclass(frozen=True)
class Ended:
    """How a child ended: by a signal, with an error of a class, an exit code and a line, or well."""

    killed: int = 0
    error: str = ""
    code: int = 0
    line: str = ""
    trace: str = ""

    @property
    def well(self) -> bool:
        return not self.killed and not self.error


@dataclass(frozen=True)
class Scenario:
    """An action that writes, and what must hold wherever it was cut short.

    before makes the folder as it was; action(run_dir, arm) calls arm where counting begins; after(run_dir, ended)
    raises AssertionError for whatever was lost.
    """

    name: str
    before: Callable[[Path], None]
    action: Callable[[Path, Callable[[], None]], None]
    after: Callable[[Path, Ended], None]


def forked(work: Callable[[], object]) -> Ended:
    """Do the work in a child, which shares what is imported but nothing it changes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work()
            told: dict[str, Any] = {}
        except RlhfError as error:
            told = {"error": type(error).__name__, "code": error.exit_code, "line": str(error)}
        except BaseException as error:
            told = {"error": type(error).__name__, "code": 1, "line": str(error), "trace": traceback.format_exc()}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], HANGS_AFTER_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(error="Hung", line=f"no end after {HANGS_AFTER_SECONDS} s")
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return Ended(killed=os.WTERMSIG(status)) if os.WIFSIGNALED(status) else Ended(**json.loads(text))


class Workbench:
    """Plays one scenario over and over, each time from the same state."""

    def __init__(self, trap: Trap, folder: Path, scenario: Scenario, *, reads: bool = False) -> None:
        self._trap, self._scenario, self._reads = trap, scenario, reads
        self._pristine, self._place = folder / "pristine", folder / "place"
        self._sizes = folder / "sizes.json"
        self._pristine.mkdir(parents=True)
        made = forked(lambda: scenario.before(self._pristine))
        assert made.well, made

    def undisturbed(self) -> list[Call]:
        """The calls of the action when all goes well."""
        journal = Journal()
        ended = self._play(Plan(Mode.COUNT, 0, 0, 0, self._reads), journal)
        assert ended.well, ended
        self._scenario.after(self._place, ended)
        return journal.calls()

    def try_point(self, at: int, fault: Fault) -> str | None:
        """What was lost when the call number `at` failed; empty: nothing; None: it cannot fail that way."""
        journal = Journal()
        plan = Plan(fault.mode, at, fault.number, fault.lasting, self._reads)
        ended = self._play(plan, journal)
        if not journal.hit:
            return None
        cut = lose_power(self._place, journal.calls(), dict(json.loads(self._sizes.read_text()))) if fault.power else ""
        fatal = fault.mode in (Mode.DIE_BEFORE, Mode.DIE_AFTER)
        if fatal != bool(ended.killed):
            return f"ended otherwise than planned: {ended}"
        if ended.error and not self._well_told(ended, journal.calls()[at - 1]):
            return f"not told as a StorageError of one line: {ended.error}: {ended.line}\n{ended.trace}"
        try:
            self._scenario.after(self._place, ended)
        except (AssertionError, RlhfError, OSError, ValueError):
            return f"{traceback.format_exc()}\n{cut}"
        return ""

    @staticmethod
    def _well_told(ended: Ended, call: Call) -> bool:
        """One line of a StorageError; what libraries make of a failed look may be another error that is tried again."""
        if call.kind is Kind.READ:
            return ended.code not in PERMANENT_CODES
        return ended.error == "StorageError" and ended.code == StorageError.exit_code and "\n" not in ended.line

    def _play(self, plan: Plan, journal: Journal) -> Ended:
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._pristine, self._place, symlinks=True)
        return forked(lambda: self._scenario.action(self._place, lambda: self._arm(plan, journal)))

    def _arm(self, plan: Plan, journal: Journal) -> None:
        """What is there now is taken to be on the disk."""
        sizes = {path.stat().st_ino: path.stat().st_size for path in files_below(self._place)}
        self._sizes.write_text(json.dumps(list(sizes.items())), encoding="utf-8")
        self._trap.arm(self._place, plan, journal)


def lose_power(folder: Path, calls: list[Call], sizes: dict[int, int]) -> str:
    """Cut every file to the length that was last synced; returns which. sizes are those of before, by inode."""
    durable, written = dict(sizes), set[int]()
    for call in calls:
        if not call.inode or call.result < 0:
            continue
        if call.kind is Kind.SYNC:
            durable[call.inode] = call.size
        else:
            written.add(call.inode)
            durable[call.inode] = min(durable.get(call.inode, 0), call.size)
    cut = []
    for path in files_below(folder):
        facts = path.stat()
        if facts.st_ino in written and facts.st_size > durable[facts.st_ino]:
            os.truncate(path, durable[facts.st_ino])
            cut.append(f"{path.relative_to(folder)} cut to {durable[facts.st_ino]} of {facts.st_size} bytes")
    return "\n".join(cut)


def files_below(folder: Path) -> Iterator[Path]:
    """All regular files."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
