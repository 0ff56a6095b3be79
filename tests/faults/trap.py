"""Makes one system call of a process fail: the Python side of trap.c."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("trap.c")
REPOSITORY = SOURCE.parents[2]
MACHINES = ("x86_64", "aarch64")
EVENTS, PATH_BYTES = 1 << 13, 200


class Mode(IntEnum):
    """What happens at the call: as in trap.c."""

    COUNT = 0
    FAIL = 1
    SHORT = 2
    DIE_BEFORE = 3
    DIE_AFTER = 4


class Kind(IntEnum):
    """What a call does: as in trap.c."""

    OTHER = 0
    OPEN = 1
    WRITE = 2
    SYNC = 3
    CLOSE = 4
    MAP = 5
    READ = 6


class Plan(ctypes.Structure):
    """Which call fails and how; `lasting`: all that follow, too; `reads`: count calls that only look, too."""

    _fields_ = [(name, ctypes.c_int64) for name in ("mode", "at", "number", "lasting", "reads")]


class Event(ctypes.Structure):
    """One counted call."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("call", "kind", "inode", "size", "result")),
        ("path", ctypes.c_char * PATH_BYTES),
    ]


class Counted(ctypes.Structure):
    """What the handler leaves in shared memory."""

    _fields_ = [("count", ctypes.c_int64), ("hit", ctypes.c_int64), ("events", Event * EVENTS)]


@dataclass(frozen=True)
class Call:
    """A counted call; size is that of the file after it, by inode 0 when there is none."""

    number: int
    kind: Kind
    inode: int
    size: int
    result: int
    path: str


class Journal:
    """Shared memory in which a child counts its calls; it outlives the child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ctypes.sizeof(Counted))
        self.counted = Counted.from_buffer(self._memory)

    @property
    def count(self) -> int:
        return int(self.counted.count)

    @property
    def hit(self) -> bool:
        """Whether the plan came true: there was such a call, and it could fail that way."""
        return bool(self.counted.hit)

    def calls(self) -> list[Call]:
        """The counted calls in their order."""
        shown = min(self.count, EVENTS)
        events = (self.counted.events[number] for number in range(shown))
        return [Call(e.call, Kind(e.kind), e.inode, e.size, e.result, os.fsdecode(e.path)) for e in events]


class Trap:
    """The built library."""

    def __init__(self, folder: Path) -> None:
        library = folder / "trap.so"
        command = ["cc", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))
        self._kept: list[object] = []

    def arm(self, folder: Path, plan: Plan, journal: Journal) -> None:
        """Trap this process's calls below `folder` from now on, in all its threads; cannot be undone."""
        self._kept = [plan, journal]
        refused = self._library.arm(os.fsencode(folder), ctypes.byref(plan), ctypes.byref(journal.counted))
        if refused:
            raise OSError(refused, f"the system refuses a seccomp filter: {os.strerror(refused)}")


def missing() -> str | None:
    """What this machine lacks for it, and how to get it; None where all is there."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return f"system calls are trapped on Linux on {' or '.join(MACHINES)}; run it there"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build tests/faults/trap.c; install gcc or clang"
    command = [sys.executable, "-m", "tests.faults.trap"]
    tried = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    if tried.returncode == 0:
        return None
    reason = tried.stderr.strip().rpartition("\n")[2]
    return f"system calls cannot be trapped here ({reason}); allow seccomp filters, and install a C compiler that works"


def main() -> None:
    """Try it out on this process."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal()
        try:
            Trap(Path(folder)).arm(Path(folder), Plan(), journal)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(str(error))
        (Path(folder) / "file").write_text("x")
        if journal.count != 3:
            sys.exit(f"the trap counted {journal.count} calls instead of open, write and close")


if __name__ == "__main__":
    main()
