"""Token ids to batches: examples of similar length together; those of SFT packed without padding.

Shapes: K tokens that are kept, whose next token counts in the loss; B rows of a padded batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from rlhf.data import Comparison, Example
from rlhf.errors import DataError
from rlhf.packing import Packed, pack
from rlhf.prompt import encode_prompt

logger = logging.getLogger(__name__)

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
        rest = rest[np.argsort(self.lengths[rest], kind="stable")]  # so that its micro-batches are of like length, too
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
class ExampleBatch:
    """Sequences without their last token; targets_K are the tokens that follow the kept ones.

    tokens is the sequences' length, that last token included.
    """

    packed: Packed
    targets_K: Tensor
    tokens: int

    @property
    def counted(self) -> int:
        """How many tokens count in the loss."""
        return len(self.targets_K)

    def to(self, device: torch.device | str) -> ExampleBatch:
        """On another device."""
        return replace(self, packed=self.packed.to(device), targets_K=self.targets_K.to(device))


def pack_examples(examples: Sequence[EncodedExample], *, loss_on: Literal["summary", "all"]) -> ExampleBatch:
    """A batch for the language-model loss: on the summary and EOS, or on the whole text.

    The first token of a sequence is predicted from nothing and never counts.
    """
    rows = [np.concatenate((example.prompt, example.response)) for example in examples]
    starts = [1 if loss_on == "all" else max(1, len(example.prompt)) for example in examples]
    targets = [row[start:] for row, start in zip(rows, starts, strict=True)]
    return ExampleBatch(
        packed=pack([row[:-1].tolist() for row in rows], keep=[len(target) for target in targets]),
        targets_K=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        tokens=sum(map(len, rows)),
    )
