"""GPT-J faster, on the modules and weights of a transformers model: fused attention, and packed passes.

transformers 5 has GPT-J's attention as single steps in float32 only, and computes the rotation of each layer from
parts that are the same in all of them.

Shapes: N tokens, K kept tokens, h heads, D head size, H hidden, R rotated pairs; B, Q, T of a padded batch: rows, new
tokens, tokens attended to.
Source of the architecture: EleutherAI's mesh-transformer-jax; attention and MLP of a block read the same norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from transformers import Cache, GPTJModel, PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJMLP, GPTJAttention

from rlhf.folded_norm import FoldedNorm, can_fold
from rlhf.onednn import mlp
from rlhf.packing import Grid, Packed

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
"""Names under which configs ask for GELU's approximation by tanh."""


class FusedAttention(nn.Module):
    """Stands in for transformers' GPTJAttention, with its projections under their names."""

    def __init__(self, attention: GPTJAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.out_proj = attention.out_proj
        self.layer_idx = attention.layer_idx
        self.heads, self.head_size = attention.num_attention_heads, attention.head_dim
        self.embed_positions = nn.Buffer(attention.embed_positions, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, Q, H], attention_mask [B, 1, Q, T] to be added, position_ids [B, Q]; as the original."""
        assert position_ids is not None, "GPTJModel gives positions"
        turns = self.turns(position_ids)
        query_BhQD = self.turned(self.q_proj(hidden_states), turns).transpose(1, 2)
        key_BhTD = self.turned(self.k_proj(hidden_states), turns).transpose(1, 2)
        value_BhTD = self.split(self.v_proj(hidden_states)).transpose(1, 2)
        if layer_past is not None:
            key_BhTD, value_BhTD = layer_past.update(key_BhTD, value_BhTD, self.layer_idx)
        mixed_BhQD = attend(query_BhQD, key_BhTD, value_BhTD, seen=attention_mask)
        return self.out_proj(mixed_BhQD.transpose(1, 2).flatten(2)), None

    def turns(self, positions: Tensor) -> Tensor:
        """cos + i sin of each token's pairs, [..., 1, R] for positions [...]: the same in all layers."""
        sin, cos = self.embed_positions[positions].float().chunk(2, dim=-1)
        return torch.complex(cos, sin).unsqueeze(-2)

    def split(self, projected: Tensor) -> Tensor:
        """[..., H] as [..., h, D]."""
        return projected.view(*projected.shape[:-1], -1, self.head_size)

    def turned(self, projected: Tensor, turns: Tensor) -> Tensor:
        """Queries or keys [..., H] as [..., h, D], or both side by side as [..., 2h, D]; each pair among the first 2R
        entries of a head is turned, as a complex number, by its position's angle. Without gradients, in place."""
        heads, count = self.split(projected), 2 * turns.shape[-1]
        if not torch.is_grad_enabled() and heads.dtype == torch.float32:
            torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2)[..., : turns.shape[-1], :]).mul_(turns)
            return heads
        pairs = torch.view_as_complex(heads[..., :count].float().unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * turns).flatten(-2).to(heads.dtype)
        return torch.cat([rotated, heads[..., count:]], dim=-1) if count < heads.shape[-1] else rotated


def use_fused_attention(model: PreTrainedModel) -> None:
    """Let a GPT-J compute the same faster; weights and their names stay, other architectures are left alone.

    In float32 its logits are equal to 1e-5; in bfloat16 to its rounding, since products of queries and keys stay in
    bfloat16.
    """
    for block in model.base_model.h if isinstance(model.base_model, GPTJModel) else ():
        if isinstance(block.attn, GPTJAttention):
            block.attn = FusedAttention(block.attn)
        if isinstance(block.mlp, GPTJMLP) and model.config.activation_function in TANH_GELU:
            block.mlp.act = nn.GELU(approximate="tanh")


def is_gptj(body: PreTrainedModel) -> bool:
    """Whether a backbone, or a view of one, is a GPT-J's with fused attention."""
    return isinstance(body, GPTJModel) and all(isinstance(block.attn, FusedAttention) for block in body.h)


def attend(query_BhQD: Tensor, key_BhTD: Tensor, value_BhTD: Tensor, *, seen: Tensor | None) -> Tensor:
    """Values mixed by attention, [B, h, Q, D]; seen is a mask as torch takes it, None: each column up to its own."""
    return F.scaled_dot_product_attention(query_BhQD, key_BhTD, value_BhTD, attn_mask=seen, is_causal=seen is None)


Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Hears of each block its number, the states that enter it, [N, H], its keys and its values, [B, h, T, D]."""


def packed_states(
    body: PreTrainedModel, packed: Packed, inputs_NH: Tensor | None = None, *, watch: Watch | None = None
) -> Tensor:
    """Final hidden states of the kept tokens, hidden_KH, with gradients; inputs_NH stand in for the embeddings."""
    hidden_NH: Tensor = body.get_input_embeddings()(packed.ids_N) if inputs_NH is None else inputs_NH
    blocks, last, whole = list(body.h), len(body.h) - 1, packed.whole()
    turns = blocks[0].attn.turns(packed.positions_N) if blocks else torch.empty(0)
    for number, block in enumerate(blocks):
        seen = partial(watch, number, hidden_NH) if watch is not None else None
        arguments = (block, hidden_NH, turns, packed if number == last else whole, seen)
        if block.training and block.gradient_checkpointing and torch.is_grad_enabled():
            hidden_NH = block._gradient_checkpointing_func(_run_block, *arguments)
        else:
            hidden_NH = _run_block(*arguments)
    normed: Tensor = body.ln_f(hidden_NH)
    return normed


def _run_block(
    block: Any, hidden_NH: Tensor, turns: Tensor, packed: Packed, watch: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """One block; of the last one, whose packed tells which tokens are kept, only their output: [K, H].

    watch hears of the keys and values.
    """
    attention: FusedAttention = block.attn
    readers = [attention.q_proj, attention.k_proj, attention.v_proj, block.mlp.fc_in]
    folded = FoldedNorm(block.ln_1) if can_fold(block.ln_1, readers, hidden_NH) else None
    normed_NH = block.ln_1(hidden_NH) if folded is None else folded.normalised(hidden_NH)
    into: Callable[[Any, Tensor], Tensor] = _call if folded is None else folded.into
    key_BhTD = _side_by_side(packed.tokens, attention.turned(into(attention.k_proj, normed_NH), turns))
    value_BhTD = _side_by_side(packed.tokens, attention.split(into(attention.v_proj, normed_NH)))
    if watch is not None:
        watch(key_BhTD, value_BhTD)
    hidden_KH, normed_KH = packed.pick(hidden_NH), packed.pick(normed_NH)
    query_KhD = attention.turned(into(attention.q_proj, normed_KH), packed.pick(turns))
    kept = packed.kept
    queries, seen = (packed.tokens, packed.seen_B1TT) if kept is None else (kept.queries, kept.seen_B1QT)
    mixed_BhQD = attend(_side_by_side(queries, query_KhD), key_BhTD, value_BhTD, seen=seen)
    mixed_KH = queries.gather(mixed_BhQD.transpose(1, 2)).flatten(1)
    if folded is None:
        widened_KH = mlp(block.mlp.fc_in, block.mlp.act, block.mlp.fc_out, normed_KH)
    else:
        widened_KH = block.mlp.fc_out(block.mlp.act(into(block.mlp.fc_in, normed_KH)))
    output: Tensor = attention.out_proj(mixed_KH) + widened_KH + hidden_KH
    return output


def _call(layer: nn.Module, entering: Tensor) -> Tensor:
    given: Tensor = layer(entering)
    return given


def _side_by_side(grid: Grid, entries: Tensor) -> Tensor:
    """[M, h, D] as [rows, h, columns, D]."""
    return grid.spread(entries).transpose(1, 2)
