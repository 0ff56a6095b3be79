"""Files on the volume: written beside and renamed, synced, hashed; and what a volume can refuse, in one line."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from rlhf.errors import StorageError

UNFINISHED = ".unfinished-"
REFUSALS = {
    errno.ENOSPC: "the volume is full: free space or enlarge it",
    errno.EDQUOT: "the quota is used up: free space or raise it",
    errno.EFBIG: "the volume allows no file of this size: use another volume",
    errno.EROFS: "the volume is read-only: mount it writable",
    errno.EACCES: "permission denied: give this user access",
    errno.EPERM: "not permitted: give this user access",
    errno.EIO: "input/output error: check the volume",
    errno.ESTALE: "stale file handle: check the network volume",
    errno.ETIMEDOUT: "the volume does not answer: check the network volume",
    errno.ENODEV: "the volume is gone: mount it again",
    errno.ENXIO: "the volume is gone: mount it again",
}


def unfinished_name(name: str) -> str:
    """A name to write under first, of nobody else's: on a shared volume pods have the same process ids."""
    return f"{UNFINISHED}{name}-{uuid.uuid4().hex[:12]}"


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new, never a part.

    Raises StorageError when the volume refuses.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / unfinished_name(path.name)
        try:
            write_synced(beside, text)
            os.replace(beside, path)
        except BaseException:
            remove(beside)
            raise
        sync(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file and have its bytes on the disk before this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as the volume lets us; the next start tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(where: Path, *, doing: str = "write") -> Iterator[None]:
    """Turn what a volume can refuse into a StorageError of one clear line."""
    try:
        yield
    except Exception as error:
        reason = REFUSALS.get(_error_number(error))
        if reason is None:
            raise
        raise StorageError(f"cannot {doing} below {where}: {reason}; what was saved before is still good") from error


def _error_number(error: Exception) -> int:
    """The system's number of what went wrong; 0 for what is no error of the system."""
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors and tokenizers name it in their text only, and tokenizers has no class of its own for it.
    if not isinstance(error, SafetensorError) and type(error) is not Exception:
        return 0
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else 0
