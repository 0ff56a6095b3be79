"""Token ids to batches: examples of similar length together, padded on the right to the longest.

Shapes: B rows of a batch, T tokens, K positions whose next token counts in the loss.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from rlhf.data import Comparison, Example
from rlhf.errors import DataError
from rlhf.prompt import encode_prompt

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that does not count, as in transformers and torch."""

POOL_BATCHES = 50
"""Batches sorted by length together: enough that lengths are alike, few enough that order stays random."""

TokenIds = NDArray[np.int32]


def fitting_posts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_tokens: int, kind: str = "posts"
) -> Iterator[tuple[Example, list[int]]]:
    """Each example with its prompt's token ids; those whose header alone is too long are left out and counted.

    Raises DataError, naming the kind of posts, when none was left.
    """
    kept = 0
    for example in examples:
        try:
            ids = encode_prompt(tokenizer, example.post, max_tokens=max_tokens).ids
        except ValueError as error:
            logger.debug("left out post=%s: %s", example.post.id, error)
            continue
        kept += 1
        yield example, ids
    if not kept:
        raise DataError(f"none of {len(examples)} {kind} fits prompt.max_prompt_tokens={max_tokens}; raise it")
    if kept < len(examples):
        logger.warning("left out %d of %d posts: header too long", len(examples) - kept, len(examples))


@dataclass(frozen=True)
class EncodedExample:
    """A prompt and its response, which ends in EOS. Arrays: a list of ints would take nine times the memory.

    id is the post's.
    """

    id: str
    prompt: TokenIds
    response: TokenIds

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class EncodedPair:
    """A prompt and its two responses, each of which ends in EOS; see pair_id."""

    id: str
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def pair_id(comparison: Comparison) -> str:
    """The post's id, then something that tells the pair from the post's others: `3fb1…-9c41d2e0`."""
    told = json.dumps([comparison.chosen, comparison.rejected, comparison.source])
    return f"{comparison.post.id}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def token_ids(ids: Sequence[int]) -> TokenIds:
    """Pack token ids."""
    return np.asarray(ids, dtype=np.int32)


class LengthGroupedSampler(Sampler[int]):
    """Indices in an order in which every `batch_size` in a row have similar lengths.

    The order depends on seed and `epoch` alone, so that a resumed run sees what an uninterrupted one would.
    The batch with the longest example comes first, so that too large a batch fails at once; an incomplete
    batch comes last.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        shuffled = random.permutation(len(self.lengths))
        complete = len(shuffled) // self.batch_size * self.batch_size
        batches = self._similar_batches(shuffled[:complete])
        random.shuffle(batches)
        if len(batches):
            longest = int(self.lengths[batches].max(axis=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        rest = shuffled[complete:]
        yield from (int(index) for index in (*batches.reshape(-1), *rest))

    def _similar_batches(self, indices: NDArray[np.intp]) -> NDArray[np.intp]:
        pool = POOL_BATCHES * self.batch_size
        pools = [indices[start : start + pool] for start in range(0, len(indices), pool)]
        by_length = [part[np.argsort(self.lengths[part], kind="stable")] for part in pools]
        return np.concatenate(by_length or [indices]).reshape(-1, self.batch_size)


def micro_batches(batch: Sequence[int], *, size: int, processes: int) -> list[list[int]]:
    """The indices of an optimiser step in micro-batches; number k belongs to process k modulo `processes`.

    Processes get equally many: an epoch's last step, which may be small, has empty ones at its end.
    """
    parts = [list(batch[start : start + size]) for start in range(0, len(batch), size)]
    return parts + [[] for _ in range(-len(parts) % processes)]


def pad_right(rows: Sequence[TokenIds], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths: ids_BT and mask_BT, both int64; the mask is 1 where a token counts."""
    longest = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = row
        mask_BT[index, : len(row)] = 1
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


@dataclass(frozen=True)
class ExampleCollator:
    """Makes batches for the language-model loss.

    `labels` are the ids where they count and IGNORED elsewhere: on the summary and EOS, or on the whole
    text. `logits_to_keep` lists the K positions whose next token counts in some row: only there does the
    model have to spell out its vocabulary.
    """

    pad_id: int
    loss_on: Literal["summary", "all"] = "summary"

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """One batch."""
        rows = [np.concatenate((example.prompt, example.response)) for example in examples]
        ids_BT, mask_BT = pad_right(rows, self.pad_id)
        labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
        if self.loss_on == "summary":
            for index, example in enumerate(examples):
                labels_BT[index, : len(example.prompt)] = IGNORED
        keep_K = (labels_BT[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "logits_to_keep": keep_K}


@dataclass(frozen=True)
class PairCollator:
    """Makes batches of B pairs in 2B rows: first the chosen ones, then the rejected ones in the same order."""

    pad_id: int

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """One batch."""
        rows = [np.concatenate((pair.prompt, pair.chosen)) for pair in pairs]
        rows += [np.concatenate((pair.prompt, pair.rejected)) for pair in pairs]
        ids_BT, mask_BT = pad_right(rows, self.pad_id)
        return {"input_ids": ids_BT, "attention_mask": mask_BT}
