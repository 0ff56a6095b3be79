"""A model's weights, read into memory of this process: every byte once, hashed while those after it come.

Nothing stays mapped. A mapped file that is cut, or whose volume goes away, ends the process that looks at it; and its
tensors lie where the file puts them, for which torch chooses other kernels than for memory of its own.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from rlhf.errors import PrerequisiteError
from rlhf.storage import storage_errors
from rlhf.weights import REMEDY, StoredTensor, read_start, weight_files

PIECE_BYTES, PIECES_BEHIND = 2**22, 8
"""Read at a time, little enough to be hashed out of the processor's cache; and how far hashing may fall behind."""

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class ReadWeights:
    """Tensors by name, and the sha256 in hex of each file that they came from, by its name in the directory."""

    tensors: dict[str, Tensor]
    digests: dict[str, str]


def read_weights(
    directory: Path, stored: Mapping[str, StoredTensor], *, dtype: torch.dtype | None = None
) -> ReadWeights:
    """All tensors of a model's files; those of floating-point numbers in `dtype`, or as they are stored.

    stored is what `weights.stored_tensors` said of them: they were judged by it, so that other headers are refused.
    At most one tensor is held in two precisions at a time.
    Raises PrerequisiteError where a file cannot be read or has changed since, StorageError where the volume refuses.
    """
    headers: dict[str, StoredTensor] = {}
    read = ReadWeights({}, {})
    for path in weight_files(directory):
        try:
            with storage_errors(directory, doing="read"), path.open("rb") as file:
                read.digests[path.name] = _read_file(file, headers, read.tensors, dtype)
        except (OSError, ValueError) as error:
            raise PrerequisiteError(f"{path} cannot be read: {error}; {REMEDY}") from error
    if headers != stored:
        raise PrerequisiteError(f"{directory}: its weights have changed while they were loaded; load them again")
    return read


def _read_file(
    file: BinaryIO, headers: dict[str, StoredTensor], tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> str:
    """Add what a file holds to both; its digest. Raises OSError and ValueError."""
    with _HashingBehind() as hashing:
        start, header = read_start(file)
        hashing.add(memoryview(start))
        for name, tensor in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
            data = torch.empty(tensor.end - tensor.begin, dtype=torch.uint8)
            for piece in _pieces(data):
                if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    raise ValueError("it has become shorter while it was read")
                hashing.add(piece)
            values = data.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
            tensors[name] = values.to(dtype) if dtype is not None and tensor.is_floating else values
        headers |= header
    return hashing.digest.hexdigest()


class _HashingBehind:
    """A sha256 that a thread works out while its bytes go on coming; it is known when the block ends."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")  # one alone keeps the order
        self._pending: deque[Future[None]] = deque()

    def add(self, piece: memoryview) -> None:
        """Hash this next; waits where too much is pending, which would keep more in memory than is needed."""
        if len(self._pending) == PIECES_BEHIND:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self.digest.update, piece))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


def _pieces(data: Tensor) -> Iterator[memoryview]:
    view = data.numpy().data
    for begin in range(0, len(view), PIECE_BYTES):
        yield view[begin : begin + PIECE_BYTES]
