"""Linear layers on a CPU by oneDNN, which multiplies float32 sooner than the library that torch asks by itself, and
applies GELU on the way, which alone takes a third of the time of the product before it.

The operations are those that `torch.compile` puts in the place of linear layers; torch has no public name for them.
Whatever they do not fit (another device or precision, autocast, adapters, hooks) is called as the module that it is.

Shapes: M rows, I columns that enter, O columns that leave.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

BLOCK_ROWS = 128
"""Rows multiplied at once. oneDNN keeps a kernel for each number of rows that it has met: packed batches would each
bring a new one. And what lies between two products of so many rows stays in the cache."""


def mlp(fc_in: nn.Module, act: nn.Module, fc_out: nn.Module, entering_MI: Tensor) -> Tensor:
    """fc_out(act(fc_in(entering))), with gradients. Without them GELU by tanh becomes part of the first product."""
    if torch.is_grad_enabled() or not (is_tanh_gelu(act) and _fits(fc_in, entering_MI) and _fits(fc_out, entering_MI)):
        given: Tensor = fc_out(act(fc_in(entering_MI)))
        return given
    leaving = entering_MI.new_empty(len(entering_MI), fc_out.out_features)
    for entering, out in zip(entering_MI.split(BLOCK_ROWS), leaving.split(BLOCK_ROWS), strict=True):
        if len(entering) == BLOCK_ROWS:
            inner = multiply(entering, fc_in.weight, fc_in.bias, gelu=True)
            out.copy_(multiply(inner, fc_out.weight, fc_out.bias))
        else:
            out.copy_(fc_out(act(fc_in(entering))))
    return leaving


def multiply(entering_MI: Tensor, weight: Tensor, bias_O: Tensor | None, *, gelu: bool = False) -> Tensor:
    """entering · weightᵀ + bias, and GELU by tanh of that: [M, O], without gradients.

    weight is [O, I], strided in any way, or what `laid_out` gave.
    """
    function, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    product: Tensor = torch.ops.mkldnn._linear_pointwise(entering_MI, weight, bias_O, function, [], algorithm)
    return product


def multiply_add(entering_MI: Tensor, weight: Tensor, bias_O: Tensor | None, plus_MO: Tensor) -> Tensor:
    """As `multiply`, and another matrix added to that."""
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(entering_MI, plus_MO, weight, bias_O, "add")
    return total


def laid_out(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of a weight as oneDNN's kernels read it; `rows` is how many the other factor mostly has."""
    copied: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), rows)
    return copied


def is_available() -> bool:
    """Whether torch has oneDNN and is to use it."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is torch's own linear layer, and does nothing beside."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def is_tanh_gelu(module: nn.Module) -> bool:
    """Whether an activation is the one that oneDNN adds to a product."""
    return isinstance(module, nn.GELU) and module.approximate == "tanh"


def _fits(module: nn.Module, entering_MI: Tensor) -> TypeGuard[nn.Linear]:
    return (
        entering_MI.device.type == "cpu"
        and entering_MI.dtype == torch.float32
        and len(entering_MI) >= BLOCK_ROWS
        and is_plain(module)
        and module.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and is_available()
    )
