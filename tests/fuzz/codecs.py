"""Inputs taken apart into lists, dictionaries and plain values, and put together again after a change."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Codec:
    """unpack gives the tree in an input; pack makes an input of a tree, or raises for one that has no such form."""

    unpack: Callable[[bytes], Any]
    pack: Callable[[Any], bytes]


def _lines_in(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def _lines_of(tree: Any) -> bytes:
    rows = tree if isinstance(tree, list) else [tree]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _weights_in(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    return {"header": json.loads(data[8 : 8 + length]), "data": len(data) - 8 - length}


def _weights_of(tree: Any) -> bytes:
    """The header's length is right, and data are as many zeros as the tree says."""
    header = json.dumps(tree["header"]).encode()
    return struct.pack("<Q", len(header)) + header + bytes(min(max(int(tree["data"]), 0), 4096))


JSON = Codec(json.loads, lambda tree: json.dumps(tree).encode())
JSON_LINES = Codec(_lines_in, _lines_of)
GZIPPED_LINES = Codec(
    lambda data: _lines_in(gzip.decompress(data)), lambda tree: gzip.compress(_lines_of(tree), mtime=0)
)
YAML = Codec(yaml.safe_load, lambda tree: yaml.safe_dump(tree).encode())
SAFETENSORS = Codec(_weights_in, _weights_of)
