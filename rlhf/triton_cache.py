"""Where Triton looks for what it has compiled: the CUDA image brings what would need a C compiler.

Triton compiles GPU kernels by itself, but its library for talking to the driver with the machine's C compiler, at
first use. The image has that library ready and no compiler; what it compiles later it keeps in TRITON_CACHE_DIR.
The image names this class in TRITON_CACHE_MANAGER.
"""

from __future__ import annotations

import sys
from pathlib import Path

from triton.runtime.cache import FileCacheManager

READY = Path(sys.prefix, "triton")


class ReadyFirst(FileCacheManager):
    """Triton's own cache, after a look at what is ready; Triton demands a subclass of it."""

    def get_file(self, filename: str) -> str | None:
        """The path of a cached file; None where there is none."""
        ready = READY / self.key / filename
        return str(ready) if ready.is_file() else super().get_file(filename)
