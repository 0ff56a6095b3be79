"""Attention of one query a row as bags of embeddings, which on a CPU takes half the time of torch's fused kernel.

For one query, attention is two weighted sums: its scores are rows of the transposed keys, weighted by the query's
entries, and what it gives are values, weighted by the softmax of the scores. `embedding_bag` is such a sum, written for
tables out of which every number is read once, as here. The fused kernel is written for many queries.

Shapes: A rows in use, B all rows, h heads, C columns, D head size, H hidden, N = A · h bags.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor


def bags_are_fast(keys: Tensor) -> bool:
    """Whether keys like these are read fastest so: in float32 on a CPU, where torch has FBGEMM's kernels."""
    return (
        keys.device.type == "cpu"
        and keys.dtype == torch.float32
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


class BagStep:
    """One more token for each of the first A rows, in column `length`; the first `columns` are read.

    keys_BhDC and values_BhCD are those of each block, contiguous.
    """

    def __init__(
        self, keys_BhDC: Sequence[Tensor], values_BhCD: Sequence[Tensor], length_A: Tensor, columns: int
    ) -> None:
        self._keys, self._values, self._columns = keys_BhDC, values_BhCD, columns
        _, heads, capacity, size = values_BhCD[0].shape
        bags = len(length_A) * heads
        self._scale = size**-0.5
        self._column_AH1 = length_A[:, None, None].expand(-1, heads * size, 1)
        self._hidden_NC = torch.where(torch.arange(columns) <= length_A[:, None], 0.0, -torch.inf)
        self._hidden_NC = self._hidden_NC.repeat_interleave(heads, dim=0)
        self._key_bags = _Bags(bags, stride=size, count=size)
        self._value_bags = _Bags(bags, stride=capacity, count=columns)
        self._places = (self._value_bags.first_N.view(-1, heads) + length_A[:, None]).flatten()

    def append(self, layer: int, key_AhD: Tensor, value_AhD: Tensor) -> None:
        """Keep the new tokens' keys and values."""
        keys, values = self._keys[layer][: len(key_AhD)], self._values[layer]
        keys.flatten(1, 2).scatter_(2, self._column_AH1, key_AhD.flatten(1)[:, :, None])
        values.view(-1, values.shape[-1]).index_copy_(0, self._places, value_AhD.flatten(0, 1))

    def mix(self, layer: int, query_AhD: Tensor) -> Tensor:
        """What the new tokens attend to, themselves included: [A, H]."""
        scores_NC = self._key_bags.sums(self._keys[layer], query_AhD * self._scale)[:, : self._columns]
        chances_NC = (scores_NC + self._hidden_NC).softmax(dim=-1)
        return self._value_bags.sums(self._values[layer], chances_NC).view(len(query_AhD), -1)


class _Bags:
    """Bag n holds `count` rows of a table, from row n · stride on."""

    def __init__(self, bags: int, *, stride: int, count: int) -> None:
        self.first_N = torch.arange(0, bags * stride, stride)
        # In 32 bits, which halves what is read beside the table.
        self._rows = (self.first_N[:, None] + torch.arange(count)).flatten().int()
        self._starts_N = torch.arange(0, bags * count, count, dtype=torch.int32)

    def sums(self, tables: Tensor, weights: Tensor) -> Tensor:
        """Of each bag's rows, weighted by as many numbers: [N, columns]; tables is [..., rows, columns]."""
        table = tables.view(-1, tables.shape[-1])
        return F.embedding_bag(self._rows, table, self._starts_N, mode="sum", per_sample_weights=weights.flatten())
