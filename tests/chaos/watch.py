"""Every change of the names in a folder, in the order in which it happened (Linux's inotify)."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOVED_FROM, MOVED_TO, CREATED, DELETED = 0x40, 0x80, 0x100, 0x200
OVERFLOW = 0x4000
HEAD = struct.Struct("iIII")


@dataclass(frozen=True)
class Change:
    """A name that came or went."""

    name: str
    came: bool


class Watch:
    """Watches one folder from its making on."""

    def __init__(self, folder: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = MOVED_FROM | MOVED_TO | CREATED | DELETED
        if self._descriptor < 0 or library.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify refuses")

    def changes(self, seconds: float) -> Iterator[Change]:
        """What has happened since the last call; waits up to `seconds` for the first."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return
        data = os.read(self._descriptor, 1 << 16)
        while data:
            _, mask, _, length = HEAD.unpack_from(data)
            name, data = data[HEAD.size : HEAD.size + length], data[HEAD.size + length :]
            if mask & OVERFLOW:
                raise RuntimeError("more changes than inotify keeps; watch more often")
            yield Change(os.fsdecode(name.rstrip(b"\0")), came=bool(mask & (MOVED_TO | CREATED)))

    def close(self) -> None:
        os.close(self._descriptor)
