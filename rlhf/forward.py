"""A packed pass through any transformer: what stages, scorer and actor call instead of a model's own forward.

GPT-J runs without padding, in a loop of our own over its blocks; other architectures run as transformers has them,
each sequence in a row of its own, padded on the right. Both give the same, up to rounding.

Shapes: S sequences, T columns, N tokens, M tokens of all sequences one by one, K kept tokens, C columns that hold some,
H hidden, V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.gptj import is_gptj, packed_states
from rlhf.packing import Grid, Packed


def hidden_states(body: PreTrainedModel, packed: Packed, *, inputs_NH: Tensor | None = None) -> Tensor:
    """Final hidden states of the kept tokens, hidden_KH, with gradients.

    body is a backbone or a view of one (`models.split_backbone`); inputs_NH stand in for the embeddings.
    """
    if is_gptj(body):
        return packed_states(body, packed, inputs_NH)
    return _padded_states(body, packed, inputs_NH)


def token_logits(policy: PreTrainedModel, packed: Packed) -> Tensor:
    """Next-token logits of a causal LM at the kept tokens, logits_KV, in its own precision, with gradients.

    Other architectures than GPT-J may scale or bend what their LM head says, so their whole forward is asked.
    """
    assert packed.kept is not None, "logits of every token are seldom wanted; keep those that are"
    if is_gptj(policy.base_model):
        head: nn.Module = policy.get_output_embeddings()
        return head(packed_states(policy.base_model, packed, None))
    index_M, grid = _one_by_one(packed)
    kept_K = _kept_among(packed, index_M.device)
    place_K = grid.places_M[kept_K]
    columns_C, column_K = (place_K % grid.columns).unique(return_inverse=True)
    logits_SCV = policy(
        **_padded_inputs(packed, index_M, grid), input_ids=grid.spread(packed.ids_N[index_M]), logits_to_keep=columns_C
    ).logits
    return logits_SCV[place_K // grid.columns, column_K]


def _padded_states(body: PreTrainedModel, packed: Packed, inputs_NH: Tensor | None) -> Tensor:
    index_M, grid = _one_by_one(packed)
    if inputs_NH is None:
        inputs = {"input_ids": grid.spread(packed.ids_N[index_M])}
    else:
        inputs = {"inputs_embeds": grid.spread(inputs_NH.index_select(0, index_M))}
    hidden_STH = body(**_padded_inputs(packed, index_M, grid), **inputs).last_hidden_state
    hidden_MH = grid.gather(hidden_STH)
    if packed.kept is None:
        return _first_of_each(hidden_MH, index_M, packed)
    return hidden_MH.index_select(0, _kept_among(packed, index_M.device))


def _padded_inputs(packed: Packed, index_M: Tensor, grid: Grid) -> dict[str, Any]:
    """What goes into a model beside the tokens."""
    return {
        "attention_mask": grid.spread(torch.ones_like(index_M)),
        "position_ids": grid.spread(packed.positions_N[index_M]),
        "use_cache": False,
    }


def _kept_among(packed: Packed, device: torch.device) -> Tensor:
    """Which of the M tokens are kept: index_K."""
    assert packed.kept is not None
    ends = accumulate(len(beginning) + len(own) for beginning, own in packed.spans)
    parts = [torch.arange(end - n, end) for end, n in zip(ends, packed.kept.counts, strict=True)]
    return torch.cat(parts).to(device)


def _one_by_one(packed: Packed) -> tuple[Tensor, Grid]:
    """index_M into the N tokens, sequence by sequence, and the grid in which each sequence has a row."""
    device = packed.ids_N.device
    parts = [[*beginning, *own] for beginning, own in packed.spans]
    columns = max(map(len, parts))
    index_M = torch.tensor([token for part in parts for token in part], device=device)
    places_M = torch.cat([row * columns + torch.arange(len(part)) for row, part in enumerate(parts)])
    return index_M, Grid(places_M.to(device), len(parts), columns)


def _first_of_each(hidden_MH: Tensor, index_M: Tensor, packed: Packed) -> Tensor:
    """Of a token that several sequences share, the state in the first of them: hidden_NH."""
    if packed.seen_B1TT is None:
        return hidden_MH
    numbers, count = index_M.tolist(), len(packed.ids_N)
    first = {token: place for place, token in reversed(list(enumerate(numbers)))}
    return hidden_MH.index_select(0, torch.tensor([first[n] for n in range(count)], device=index_M.device))
