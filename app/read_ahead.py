"""The weight files read before anything can take them, so that a slow volume works while Python imports.

What is read is thrown away: the machine keeps it in its page cache, as far as there is room. Loading judges,
verifies and reads the files itself, and only finds them sooner.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlhf.errors import RlhfError
from rlhf.weights import weight_files

PIECE_BYTES = 2**22


def read_ahead(run_dir: Path, names: Sequence[str]) -> threading.Thread:
    """Begin to read what `final` of these stages holds; a thread that ends with the process does it."""
    thread = threading.Thread(target=_read, args=(run_dir, names), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _read(run_dir: Path, names: Sequence[str]) -> None:
    piece = bytearray(PIECE_BYTES)
    for name in names:
        with suppress(RlhfError, OSError):  # whatever is wrong with them, loading finds it and tells it
            for path in weight_files(run_dir / name / "final"):
                with path.open("rb", buffering=0) as file:
                    while file.readinto(piece):
                        pass
