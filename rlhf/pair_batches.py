"""Pairs of the reward model as batches: the prompt that chosen and rejected share is computed once.

Shapes: P pairs, B = 2P summaries, the chosen ones first where they are padded, R response columns, T columns of prompt
and response, K tokens whose score is read, M padding tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf.collate import EncodedPair, pad_right
from rlhf.packing import Packed, pack_groups


@dataclass(frozen=True)
class PairBatch:
    """Pairs of which the score at each summary's end is read: chosen, rejected, chosen and so on.

    tokens is the sequences' length, the prompt counted with each.
    """

    packed: Packed
    tokens: int

    @property
    def counted(self) -> int:
        """How many pairs there are."""
        return len(self.packed.spans) // 2

    def to(self, device: torch.device | str) -> PairBatch:
        """On another device."""
        return replace(self, packed=self.packed.to(device))


@dataclass(frozen=True)
class DivergentPairs:
    """Pairs of which the score at every position of a summary is read, and past the shorter one's end at padding.

    ids_BR and mask_BR are the summaries; place r of summary b has score number read_BR[b, r].
    """

    packed: Packed
    ids_BR: Tensor
    mask_BR: Tensor
    read_BR: Tensor
    tokens: int

    @property
    def counted(self) -> int:
        """How many pairs there are."""
        return len(self.ids_BR) // 2

    def to(self, device: torch.device | str) -> DivergentPairs:
        """On another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("packed", "ids_BR", "mask_BR", "read_BR")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class PaddedPairs:
    """The same in rows of their own, prompt and summary, padded on the right: for any architecture."""

    ids_BT: Tensor
    mask_BT: Tensor
    tokens: int

    @property
    def counted(self) -> int:
        """How many pairs there are."""
        return len(self.ids_BT) // 2

    def to(self, device: torch.device | str) -> PaddedPairs:
        """On another device."""
        return replace(self, ids_BT=self.ids_BT.to(device), mask_BT=self.mask_BT.to(device))


def pack_pairs(pairs: Sequence[EncodedPair]) -> PairBatch:
    """For the loss on the last scores, and for measuring."""
    endings = [(pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]
    return PairBatch(pack_groups([pair.prompt.tolist() for pair in pairs], endings, keep=1), _tokens(pairs))


def pad_pairs(pairs: Sequence[EncodedPair], *, pad_id: int) -> PaddedPairs:
    """For the divergent loss."""
    rows = [np.concatenate((pair.prompt, pair.chosen)) for pair in pairs]
    rows += [np.concatenate((pair.prompt, pair.rejected)) for pair in pairs]
    return PaddedPairs(*pad_right(rows, pad_id), tokens=_tokens(pairs))


def pack_divergent(pairs: Sequence[EncodedPair], *, pad_id: int) -> DivergentPairs:
    """For the divergent loss, on GPT-J, whose own pass attends as the batch says.

    In a padded row all padding after a sequence is one and the same to the model: it stands at the position of the
    last token, sees all tokens and no padding, and nothing sees it. So one such token stands for all.
    """
    endings = [(pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]
    lengths = [[len(one) for one in both] for both in endings]
    shorter = [[length < max(both) for length in both] for both in lengths]
    endings = [
        ([*chosen, pad_id] if first else chosen, [*rejected, pad_id] if second else rejected)
        for (chosen, rejected), (first, second) in zip(endings, shorter, strict=True)
    ]
    keep = [len(one) for both in endings for one in both]
    packed = pack_groups([pair.prompt.tolist() for pair in pairs], endings, keep=keep)
    last_B = torch.tensor(keep).cumsum(0) - 1
    _let_be_padding(packed, last_B[torch.tensor(shorter).flatten()])
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids_BR, mask_BR = pad_right(rows, pad_id)
    # In the packed pass chosen and rejected alternate.
    first_B1 = (last_B + 1 - torch.tensor(keep)).view(-1, 2).T.reshape(-1, 1)
    last_B1 = last_B.view(-1, 2).T.reshape(-1, 1)
    return DivergentPairs(
        packed=packed,
        ids_BR=ids_BR,
        mask_BR=mask_BR,
        read_BR=torch.minimum(first_B1 + torch.arange(ids_BR.shape[1]), last_B1),
        tokens=_tokens(pairs),
    )


def _let_be_padding(packed: Packed, kept_M: Tensor) -> None:
    """Let some of the kept tokens, each its sequence's last, be padding: not seen by themselves, and a place earlier.

    kept_M are their numbers among the kept tokens. Changes a batch that was just made.
    """
    kept, columns = packed.kept, packed.tokens.columns
    assert kept is not None, "pairs are packed so"
    assert packed.seen_B1TT is not None, "as above"
    token_M = kept.index_K[kept_M]
    row_M, column_M = packed.tokens.places_M[token_M] // columns, packed.tokens.places_M[token_M] % columns
    query_M = kept.queries.places_M[kept_M] % kept.queries.columns
    packed.positions_N[token_M] -= 1
    packed.seen_B1TT[row_M, 0, column_M, column_M] = False
    kept.seen_B1QT[row_M, 0, query_M, column_M] = False


def _tokens(pairs: Sequence[EncodedPair]) -> int:
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
