"""One writer a stage: a lease on the stage's folder, with a holder, a beat and a token that fences off the one before.

    <run>/<stage>/.writer-00000007/            the room of the holder of token 7
    <run>/<stage>/.writer-00000007/lease.json  who that is; its time of change is the beat

Whoever wants to write makes the room of the next token, by a rename that only one can win. All that it shows in the
stage's folder is made in its room and renamed out of it. Who takes over moves the rooms of lower tokens away and
empties them, so that whatever their holders still try fails, however long they slept and whatever their clocks say.
Nothing here relies on flock or on clocks of different machines: a lease is stale when its beat has not changed for
as long as it promises, by the clock of the one who watches.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from rlhf.errors import StopRequested
from rlhf.storage import remove, storage_errors, sync, unfinished_name, write_synced

logger = logging.getLogger(__name__)

LEASE = "lease.json"
ROOM = re.compile(r"\.writer-(\d{8})")
FENCED = ".fenced-"
BEATS_PER_LEASE = 5
POLL_SECONDS = 0.1


class LeaseHeld(StopRequested):
    """Another process is at work on the stage."""


class LeaseLost(StopRequested):
    """Another process has taken the stage over."""


@dataclass(frozen=True)
class Holder:
    """A process. machine is the same for processes that see each other's ids, and only for those."""

    host: str
    pid: int
    machine: str
    started: str


@dataclass(frozen=True)
class Claim:
    """What lease.json says: the holder, for how many seconds without a beat it holds, since when (for people)."""

    holder: Holder
    seconds: float
    since: str
    released: bool = False


@dataclass(frozen=True)
class Sight:
    """What a glance at a stage's folder shows: the highest token (0: none yet), its claim, and its beat."""

    token: int
    claim: Claim | None
    beat: int


class Lease:
    """The right to write in a stage's folder, while `room` is there; a thread keeps it fresh.

    on_lost is called from that thread, once, when somebody else has taken over.
    """

    def __init__(self, room: Path, token: int, claim: Claim) -> None:
        self.room, self.token = room, token
        self.on_lost: Callable[[], None] = lambda: None
        self._claim = claim
        # By its descriptor the room stays this one, also if a library makes a folder of that name again.
        self._folder = os.open(room, os.O_RDONLY | os.O_DIRECTORY)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def show(self, name: str, target: Path) -> None:
        """Rename what lies in the room to its place in the stage's folder; fails for good once the lease is lost."""
        self._rename(name, target, source=self._folder)

    def hide(self, path: Path, name: str) -> None:
        """Rename what lies in the stage's folder into the room; fails for good once the lease is lost."""
        self._rename(path, name, target=self._folder)

    def check(self) -> None:
        """Raise LeaseLost when somebody else has taken over."""
        if self._is_lost():
            raise LeaseLost(
                f"{self.room.parent} was taken over by {_who(look(self.room.parent).claim)} while this process made "
                "no progress; what was saved is there: let that one go on"
            )

    def release(self) -> None:
        """Give the lease back, so that the next one need not wait."""
        self._ended.set()
        self._thread.join()
        try:
            for leftover in self.room.iterdir():
                if leftover.name != LEASE:
                    remove(leftover)
            beside = self.room / unfinished_name(LEASE)
            write_synced(beside, json.dumps(asdict(replace(self._claim, released=True))))
            os.replace(beside, self.room / LEASE)
        except OSError as error:  # lost, or a volume that refuses: then the next one has to wait
            logger.debug("lease not given back: %s", error)
        os.close(self._folder)

    def _rename(
        self, old: str | Path, new: str | Path, *, source: int | None = None, target: int | None = None
    ) -> None:
        try:
            os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)
        except OSError:
            self.check()
            raise

    def _is_lost(self) -> bool:
        try:
            (self.room / LEASE).stat()
        except OSError as error:  # a volume that refuses has not given the lease to another
            return error.errno in (errno.ENOENT, errno.ESTALE)
        return False

    def _keep_fresh(self) -> None:
        while not self._ended.wait(self._claim.seconds / BEATS_PER_LEASE):
            try:
                os.utime(self.room / LEASE)
            except FileNotFoundError:
                self.on_lost()
                return
            except OSError as error:  # a volume may recover; if not, somebody else may take over
                logger.debug("no beat: %s", error)


def take_lease(stage_path: Path, *, seconds: float) -> Lease:
    """Become the one writer of a stage's folder; a holder that shows no sign of life for its time is fenced off.

    Raises LeaseHeld while another process is at work, StorageError when the volume refuses.
    """
    with storage_errors(stage_path):
        stage_path.mkdir(parents=True, exist_ok=True)
        claim = Claim(this_process(), seconds, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        token = _wait_until_free(stage_path, seconds).token + 1
        room = _make_room(stage_path, token, claim)
        rooms = _rooms(stage_path)
        if max(rooms) > token:  # our glance was old: tokens have moved on meanwhile
            remove(room)
            raise LeaseHeld(_held(stage_path, look(stage_path).claim))
        for lower in rooms.keys() - {token}:
            _fence(rooms[lower])
        for leftover in stage_path.glob(f"{FENCED}*"):  # which somebody else may still be emptying
            _empty(leftover)
        sync(stage_path)
        try:
            return Lease(room, token, claim)
        except FileNotFoundError as error:  # overtaken before it had begun
            raise LeaseHeld(_held(stage_path, look(stage_path).claim)) from error


def look(stage_path: Path) -> Sight:
    """Who holds a stage, or held it last."""
    rooms = _rooms(stage_path)
    if not rooms:
        return Sight(0, None, 0)
    token = max(rooms)
    try:
        # Opening makes a network file system ask the server; a bare stat may tell what it remembers.
        with (rooms[token] / LEASE).open(encoding="utf-8", errors="replace") as file:
            return Sight(token, parse_claim(file.read()), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return Sight(token, None, 0)


def parse_claim(text: str) -> Claim | None:
    """What a lease.json says; None for what is none."""
    try:
        fields = json.loads(text)
        holder = fields["holder"]
        claim = Claim(
            Holder(str(holder["host"]), int(holder["pid"]), str(holder["machine"]), str(holder["started"])),
            float(fields["seconds"]),
            str(fields["since"]),
            fields["released"] is True,
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return claim if 0 < claim.seconds < 86_400 and claim.holder.pid > 0 else None


def this_process() -> Holder:
    """Us, as others can tell."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: there are no containers with ids of their own
        machine = host
    return Holder(host, os.getpid(), machine, _started(os.getpid()))


def is_dead(holder: Holder) -> bool:
    """Whether a process is known to be gone; one that we cannot see is not."""
    if holder.machine != this_process().machine:
        return False
    if Path("/proc/self/stat").exists():
        return _started(holder.pid) != holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty for one that is gone or only not buried yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _wait_until_free(stage_path: Path, seconds: float) -> Sight:
    """The last sight of a folder that nobody holds, or whose holder is dead or has not beaten for its time."""
    first = sight = look(stage_path)
    until = time.monotonic() + (first.claim.seconds if first.claim else seconds)
    while not _is_free(sight):
        if sight != first:
            raise LeaseHeld(_held(stage_path, sight.claim))
        time.sleep(min(POLL_SECONDS, seconds / BEATS_PER_LEASE))
        # The time before the look counts: this process may be stopped between the two.
        now, sight = time.monotonic(), look(stage_path)
        if now > until and sight == first:
            logger.warning("taking over from %s, which shows no sign of life", _who(sight.claim))
            return sight
    return sight


def _is_free(sight: Sight) -> bool:
    if sight.token == 0:
        return True
    return sight.claim is not None and (sight.claim.released or is_dead(sight.claim.holder))


def _rooms(stage_path: Path) -> dict[int, Path]:
    matches = ((ROOM.fullmatch(entry.name), Path(entry.path)) for entry in os.scandir(stage_path))
    return {int(match[1]): path for match, path in matches if match}


def _make_room(stage_path: Path, token: int, claim: Claim) -> Path:
    """Our room, with the claim in it from the first moment; a name that is taken cannot be renamed onto."""
    beside, room = stage_path / unfinished_name("room"), stage_path / f".writer-{token:08d}"
    try:
        beside.mkdir()
        write_synced(beside / LEASE, json.dumps(asdict(claim)))
        os.rename(beside, room)
    except BaseException as error:
        remove(beside)
        # The name is taken, or who took it has cleaned up our preparations.
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise LeaseHeld(_held(stage_path, look(stage_path).claim)) from error
        raise
    return room


def _fence(room: Path) -> None:
    """Take a room away from its holder, whose renames out of it and into it fail from here on."""
    away = room.with_name(f"{FENCED}{uuid.uuid4().hex[:12]}")
    try:
        os.rename(room, away)
    except FileNotFoundError:
        return  # its holder withdrew, or another process that takes over was quicker: then it is a leftover now
    _empty(away)


def _empty(away: Path) -> None:
    """Move out what is in a folder until it can be removed.

    Its holder still has it by a descriptor, and a network file system by what it remembers; removed it can neither
    give nor take a name. Two processes may do this at once.
    """
    emptied = away.with_name(unfinished_name("fenced"))
    while True:
        try:
            emptied.mkdir(exist_ok=True)  # another process that starts clears what looks like a leftover
            for entry in list(away.iterdir()):
                with suppress(FileNotFoundError):  # its holder has shown it in the last moment, whole
                    os.rename(entry, emptied / uuid.uuid4().hex)
            os.rmdir(away)
            break
        except FileNotFoundError:
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    remove(emptied)


def _who(claim: Claim | None) -> str:
    if claim is None:
        return "another process"
    return f"process {claim.holder.pid} on {claim.holder.host} (since {claim.since})"


def _held(stage_path: Path, claim: Claim | None) -> str:
    return (
        f"{_who(claim)} is at work on stage {stage_path.name} of run {stage_path.parent.name!r}; "
        "wait for it to end or stop it, then run the same command again"
    )
