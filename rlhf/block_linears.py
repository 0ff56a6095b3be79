"""The linear layers of a GPT-J's blocks, as a decoder calls them: its modules, or their weights laid out for the CPU.

oneDNN multiplies faster when it may order a weight matrix as its kernels read it. That order is a copy, which lives as
long as one batch is written and must pay for itself within it. Measured on one core of a busy machine, GPT-J of
6 blocks × 256: a step of 16 rows took 11.8 ms with modules and 8.7 with copies, a prefill of 16 prompts 206 and 159 ms,
making the copies 12 ms; a single row gained nothing.

Shapes: M tokens of a pass, K of them whose output is read, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockLinears:
    """What a block multiplies with: [M, H] to keys and values side by side, [M, 2 · H]; the others [K, H] to [K, H]."""

    key_value: Product
    query: Product
    out: Product
    mlp: Product


def linears_of(model: PreTrainedModel, *, rows: int, steps: int) -> tuple[list[BlockLinears], Product]:
    """Those of a GPT-J's blocks, and its LM head ([K, H] to [K, V]), for a batch of so many rows.

    steps: how many will be made before the weights may change; 0 where that is not known.
    """
    blocks, head = backbone(model).h, model.get_output_embeddings()
    if rows >= ROWS_WORTH_PACKING and steps >= STEPS_WORTH_PACKING and _packable(model):
        return [_copies(block.attn, block.mlp, rows) for block in blocks], _packed(head, rows)
    return module_linears(model), head


def module_linears(model: PreTrainedModel) -> list[BlockLinears]:
    """Those of a GPT-J's blocks as they are."""
    return [_modules(block.attn, block.mlp) for block in backbone(model).h]


def _modules(attention: FusedAttention, mlp: GPTJMLP) -> BlockLinears:
    """Calls the modules, or what gives the same; adapters, autocast and hooks have their effect."""

    def key_value(normed_MH: Tensor) -> Tensor:
        return torch.cat([attention.k_proj(normed_MH), attention.v_proj(normed_MH)], dim=-1)

    return BlockLinears(
        key_value=key_value,
        query=attention.q_proj,
        out=attention.out_proj,
        mlp=partial(onednn.mlp, mlp.fc_in, mlp.act, mlp.fc_out),
    )


def _copies(attention: FusedAttention, mlp: GPTJMLP, rows: int) -> BlockLinears:
    """Multiplies with copies of the weights as they are now."""
    fc_in = _Packed(mlp.fc_in.weight, mlp.fc_in.bias, rows, gelu=True)
    fc_out = _packed(mlp.fc_out, rows)
    return BlockLinears(
        key_value=_Packed(torch.cat([attention.k_proj.weight, attention.v_proj.weight]), None, rows),
        query=_packed(attention.q_proj, rows),
        out=_packed(attention.out_proj, rows),
        mlp=lambda normed_KH: fc_out(fc_in(normed_KH)),
    )


class _Packed:
    """A matrix as oneDNN's kernels read it; `rows` is how many the other factor mostly has."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, *, gelu: bool = False) -> None:
        self._weight = onednn.laid_out(weight, rows)
        self._bias = None if bias is None else bias.detach()
        self._gelu = gelu

    def __call__(self, entering: Tensor) -> Tensor:
        return onednn.multiply(entering, self._weight, self._bias, gelu=self._gelu)


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
