"""Weights on disk: which files hold a model's, and what their headers say, judged before any tensor is read.

A safetensors file is a length N in 8 bytes (little-endian), N bytes of JSON that give each tensor's dtype, shape and
place, and the tensors' bytes without gaps. A model has one such file, or shards and an index of them.
Source: safetensors, README.md, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import PrerequisiteError
from rlhf.quoting import shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 2**25
"""A header has about 120 bytes a tensor; GPT-J's has 35,000 and that of a model of 100,000 tensors 12 million."""
MAX_INDEX_BYTES = 2**26
MAX_DIMENSIONS = 16
MAX_DIMENSION = 2**40

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})

REMEDY = "download the model again or, where a stage wrote it, run the stage again"
SAFETENSORS, PICKLES = "*.safetensors", "pytorch_model*.bin"
CONVERT = "set model.pickled=convert to have its tensors, and nothing else, taken out of them"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header gives it; begin and end are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether it is a weight; old files also hold attention masks, which are integers or bools."""
        return self.dtype in FLOATING


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor in a model's files by name, from checked headers alone.

    Raises PrerequisiteError, in one line, for what `weight_files` and `read_header` refuse, and for an index that
    does not go with its shards.
    """
    files = weight_files(directory)
    if files == [directory / WEIGHTS]:
        return read_header(files[0])
    placed = _read_index(directory / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        header = read_header(path)
        if twice := header.keys() & tensors.keys():
            raise PrerequisiteError(f"{path} holds {shown(min(twice))}, which another shard holds too; {REMEDY}")
        if lacking := {name for name, shard in placed.items() if shard == path.name} - header.keys():
            raise PrerequisiteError(f"{path} lacks {shown(min(lacking))}, which {INDEX} places there; {REMEDY}")
        tensors |= header
    return tensors


def count_parameters(stored: Mapping[str, StoredTensor]) -> int:
    """Floating-point numbers among a model's tensors."""
    return sum(tensor.numbers for tensor in stored.values() if tensor.is_floating)


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads, whatever else lies beside them, as PPO's optimiser does.

    Raises PrerequisiteError where there are none in safetensors, where one is missing, and where a name in the index
    or a link leads out of the directory; links into the Hub's own cache are in order.
    """
    if _exists(directory / WEIGHTS):
        names: Iterable[str] = [WEIGHTS]
    elif _exists(directory / INDEX):
        names = sorted(set(_read_index(directory / INDEX).values()))
    else:
        raise PrerequisiteError(_no_weights(directory))
    return [_inside(directory, name) for name in names]


def _no_weights(directory: Path) -> str:
    advice = f"{directory} has no {WEIGHTS}; run the stage again, or save its weights as safetensors"
    if not (pickles := sorted(path.name for path in directory.glob(PICKLES))):
        return f"{advice}: nothing is unpickled here"
    return (
        f"{advice}: nothing is unpickled here, and {pickles[0]} is a pickle, which can run code; "
        f"where it is to be the base model, {CONVERT}"
    )


def _inside(directory: Path, name: str) -> Path:
    """A weight file's path, once it is known to lie where it seems to."""
    path = directory / name
    if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
        raise PrerequisiteError(
            f"{directory / INDEX} names {shown(name)}, which is no safetensors file in its directory; {REMEDY}"
        )
    if not _exists(path):
        raise PrerequisiteError(f"{directory} has no {shown(name)}, which {INDEX} names; {REMEDY}")
    home = directory.resolve()
    allowed = {home}
    if home.parent.name == "snapshots":  # the Hub's cache: <model>/snapshots/<revision>/ links into <model>/blobs/
        allowed.add(home.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise PrerequisiteError(f"{path} is a link that leads out of its directory; put the file itself there")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with half a surrogate pair
        return False


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"longer than {MAX_INDEX_BYTES} bytes")
        return parse_index(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path} is no index of weights: {error}; {REMEDY}") from error


def parse_index(text: bytes) -> dict[str, str]:
    """The shard of each tensor, from the text of an index. Raises ValueError saying what is wrong with it."""
    placed = parse_object(text).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError("it has no weight_map")
    for name, shard in placed.items():
        if not isinstance(shard, str):
            raise ValueError(f"{shown(name)} is in no file")
    return placed


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds, by name; reads its header and nothing else.

    Raises PrerequisiteError naming the file and what is wrong with its header or its length.
    """
    try:
        with path.open("rb") as file:
            return read_start(file)[1]
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path} is not a safetensors file: {error}; {REMEDY}") from error


def read_start(file: BinaryIO) -> tuple[bytes, dict[str, StoredTensor]]:
    """A safetensors file's bytes up to its tensors, and what they say; the file then stands at the first tensor.

    Raises ValueError saying what is wrong with its header or its length, and OSError.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"it has {size} bytes, too few for its header")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    text = file.read(length)
    return prefix + text, parse_header(text, data_bytes=size - 8 - length)


def parse_header(text: bytes, *, data_bytes: int) -> dict[str, StoredTensor]:
    """The tensors that a header describes, which fill the `data_bytes` after it without gaps.

    Raises ValueError saying what is wrong with it.
    """
    header = parse_object(text)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ holds something other than text")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    reached = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != reached:
            what = "overlaps another tensor" if tensor.begin < reached else f"leaves a gap after byte {reached}"
            raise ValueError(f"{shown(name)} {what}")
        reached = tensor.end
    if reached != data_bytes:
        raise ValueError(f"its tensors take {reached} bytes, and {data_bytes} are there")
    return tensors


def _tensor(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} is not given by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{shown(name)} has the dtype {shown(dtype)}; known are {', '.join(DTYPE_BYTES)}")
    if not _whole_numbers(shape, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{shown(name)} has the impossible shape {shown(shape)}")
    if not _whole_numbers(offsets, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown(name)} has the impossible data_offsets {shown(offsets)}")
    tensor = StoredTensor(dtype, tuple(shape), *offsets)
    if (needed := tensor.numbers * DTYPE_BYTES[dtype]) != tensor.end - tensor.begin:
        raise ValueError(f"{shown(name)} has {tensor.end - tensor.begin} bytes, and its shape needs {shown(needed)}")
    return tensor


def _whole_numbers(values: Any, most: int) -> bool:
    """Whether this is a list of integers from 0 to `most`."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= most for value in values)


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object, in which no name is there twice. Raises ValueError saying what is wrong with the text."""
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at byte {error.pos}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a JSON object")
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shown(name)} is there twice")
        values[name] = value
    return values
