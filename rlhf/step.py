"""What an optimiser step came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stepped:
    """An optimiser step, the same on all processes.

    grad_norm is the gradients' norm before clipping. wrong says why the weights stayed where they were, except while
    float16's loss scale is being sought: an overflow is part of that.
    """

    grad_norm: float
    taken: bool
    wrong: str | None
