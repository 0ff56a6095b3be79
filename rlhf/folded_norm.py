"""Linear layers over a norm whose input needs no gradient: the first trained block above a frozen trunk.

With x̂ the input normalised, before the norm's own weight γ and bias β, a layer over the norm gives

    (γ x̂ + β) Wᵀ + b  =  x̂ (W γ)ᵀ + (W β + b)

On the right nothing that depends on the tokens wants a gradient but the result: γ and β get theirs through a product as
large as the weight. On the left they want the gradient of every token, a third of what such a layer's training costs.

Shapes: N tokens, H hidden, O columns that leave.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from rlhf.onednn import is_plain


class FoldedNorm:
    """A layer norm, and how linear layers read what it gives."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._norm = norm

    def normalised(self, hidden_NH: Tensor) -> Tensor:
        """x̂ of each token."""
        return F.layer_norm(hidden_NH, self._norm.normalized_shape, eps=self._norm.eps)

    def into(self, layer: nn.Linear, normalised_NH: Tensor) -> Tensor:
        """What the layer gives on the norm's output, [N, O], with gradients of layer and norm."""
        bias_O = layer.weight @ self._norm.bias
        return F.linear(
            normalised_NH, layer.weight * self._norm.weight, bias_O if layer.bias is None else bias_O + layer.bias
        )


def can_fold(norm: nn.Module, layers: list[nn.Module], hidden_NH: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether the norm is trained, its input is not, and the layers over it are plain ones.

    On a CPU alone: a GPU multiplies so much faster than it reads that another copy of the weights costs more.
    """
    return (
        torch.is_grad_enabled()
        and not hidden_NH.requires_grad
        and hidden_NH.device.type == "cpu"
        and hidden_NH.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and type(norm) is nn.LayerNorm
        and norm.bias is not None
        and norm.weight.requires_grad
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and all(is_plain(layer) and layer.weight.dtype == torch.float32 for layer in layers)
    )
