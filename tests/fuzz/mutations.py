"""hypothesis strategies that spoil an input which is in order: its bytes, or the values in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from tests.fuzz.codecs import Codec

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.5, 1.5, 1e308,
    float("inf"), float("nan"), "", "x", "\n", "\0", "\ud800", "\u2028", "é" * 50, "x" * 300, "..", "../x",
    "/etc/passwd", "1", "nan", "null", [], [[]], {}, {"": None}, [None], ["x"], [0, 1], {"x": {"x": []}},
)  # fmt: skip
MOST_EDITS = 4

json_values = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def spoiled_bytes(draw: st.DrawFn, sample: bytes) -> bytes:
    """A sample with a few bytes changed, put in, taken out or doubled."""
    data = bytearray(sample)
    for _ in range(draw(st.integers(1, MOST_EDITS))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 16)))
        kind = draw(st.sampled_from(("replace", "remove", "double", "cut")))
        if kind == "replace":
            data[start:end] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del data[start:end]
        elif kind == "double":
            data[start:start] = data[start:end]
        else:
            del data[start:]
    return bytes(data)


@st.composite
def spoiled_values(draw: st.DrawFn, sample: bytes, codec: Codec) -> bytes:
    """A sample of the right form, with a few of its values replaced, removed, doubled, or under other names."""
    tree = [codec.unpack(sample)]
    for _ in range(draw(st.integers(1, MOST_EDITS))):
        node, key = draw(st.sampled_from(list(_places(tree))))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "double", "rename")))
        if kind == "replace" or node is tree:
            node[key] = copy.deepcopy(draw(json_values))
        elif kind == "remove":
            del node[key]
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        else:
            value = copy.deepcopy(node[key]) if kind == "double" else node.pop(key)
            node[draw(st.text(max_size=8) | st.sampled_from(("", "..", "\ud800", "x" * 300)))] = value
    try:
        return codec.pack(tree[0])
    except (TypeError, ValueError, KeyError, AttributeError):
        reject()


def _places(tree: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree as its container and the key there."""
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield node, key
            if isinstance(value, (dict, list)):
                pending.append(value)
