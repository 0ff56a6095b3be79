"""The linear layers of a GPT-J's blocks, as a decoder calls them: its modules, or their weights laid out for the CPU.

oneDNN multiplies faster when it may order a weight matrix as its kernels read it. That order is a copy, which lives as
long as one batch is written and must pay for itself within it. Measured on one core, GPT-J of 6 blocks × 256: the
products of a step of 16 rows take three fifths of the time, making the copies 12 ms; a single row gained nothing.

Shapes: A rows in use, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJMLP

from rlhf import onednn
from rlhf.gptj import FusedAttention
from rlhf.models import backbone

STEPS_WORTH_PACKING = 16
ROWS_WORTH_PACKING = 4
"""A batch of fewer steps or rows is written sooner without."""

MOST_PACKED_BYTES = 2**29
"""Of larger models no second copy is made."""


@dataclass(frozen=True)
class BlockLinears:
    """What a block multiplies with.

    query_key_value makes of [A, H] all three side by side, [A, 3 · H]. out takes what the attention gave, what the
    block's norm gave and what entered the block, and gives what leaves it, [A, H] all.
    """

    query_key_value: Callable[[Tensor], Tensor]
    out: Callable[[Tensor, Tensor, Tensor], Tensor]


def linears_of(
    model: PreTrainedModel, *, rows: int, steps: int
) -> tuple[list[BlockLinears], Callable[[Tensor], Tensor]]:
    """Those of a GPT-J's blocks, and its LM head ([A, H] to [A, V]), for a batch of so many rows.

    steps: how many will be made before the weights may change; 0 where that is not known.
    """
    blocks, head = backbone(model).h, model.get_output_embeddings()
    if rows >= ROWS_WORTH_PACKING and steps >= STEPS_WORTH_PACKING and _packable(model):
        return [_copies(block.attn, block.mlp, rows) for block in blocks], _packed(head, rows)
    return [_modules(block.attn, block.mlp) for block in blocks], head


def _modules(attention: FusedAttention, mlp: GPTJMLP) -> BlockLinears:
    """Calls the modules; adapters, autocast and hooks have their effect."""

    def query_key_value(normed_AH: Tensor) -> Tensor:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.cat([layer(normed_AH) for layer in layers], dim=-1)

    def out(mixed_AH: Tensor, normed_AH: Tensor, hidden_AH: Tensor) -> Tensor:
        left: Tensor = attention.out_proj(mixed_AH) + mlp.fc_out(mlp.act(mlp.fc_in(normed_AH))) + hidden_AH
        return left

    return BlockLinears(query_key_value, out)


def _copies(attention: FusedAttention, mlp: GPTJMLP, rows: int) -> BlockLinears:
    """Multiplies with copies of the weights as they are now."""
    projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    out_proj, fc_out = _packed(attention.out_proj, rows), _packed(mlp.fc_out, rows)
    fc_in = _Packed(mlp.fc_in.weight, mlp.fc_in.bias, rows)

    def out(mixed_AH: Tensor, normed_AH: Tensor, hidden_AH: Tensor) -> Tensor:
        return fc_out(fc_in(normed_AH, gelu=True), plus=out_proj(mixed_AH, plus=hidden_AH))

    return BlockLinears(_Packed(torch.cat(projections), None, rows), out)


class _Packed:
    """A matrix as oneDNN's kernels read it; `rows` is how many the other factor mostly has."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._weight = onednn.laid_out(weight, rows)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, entering: Tensor, *, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
        if plus is not None:
            return onednn.multiply_add(entering, self._weight, self._bias, plus)
        return onednn.multiply(entering, self._weight, self._bias, gelu=gelu)


def _packed(module: nn.Linear, rows: int) -> _Packed:
    return _Packed(module.weight, module.bias, rows)


def _packable(model: PreTrainedModel) -> bool:
    """Whether copies of a GPT-J's weights can be made and give what its modules give."""
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    weights = [module.weight for module in _linears(model) if isinstance(module, nn.Linear)]
    return (
        onednn.is_available()
        and plain_linears(model)
        and all(weight.dtype == torch.float32 for weight in weights)
        and sum(weight.nbytes for weight in weights) <= MOST_PACKED_BYTES
        and all(onednn.is_tanh_gelu(block.mlp.act) for block in backbone(model).h)
    )


def plain_linears(model: PreTrainedModel) -> bool:
    """Whether a GPT-J's linear layers are torch's own, and do nothing beside."""
    return all(onednn.is_plain(module) for module in _linears(model))


def _linears(model: PreTrainedModel) -> Iterator[nn.Module]:
    for block in backbone(model).h:
        attention = block.attn
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        yield from (block.mlp.fc_in, block.mlp.fc_out)
    yield model.get_output_embeddings()
