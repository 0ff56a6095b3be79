"""Numbers of held-out examples from a model in training, batches shared among the processes.

Shapes: N examples, K numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor


@torch.no_grad()
def held_out_rows(
    examples: Sequence[Any], measure: Callable[[Sequence[Any]], Tensor], *, size: int, interrupted: Callable[[], bool]
) -> NDArray[np.float32] | None:
    """rows_NK, in the order of the examples; measure gives them for a batch of `size`. None when interrupted.

    All processes have to call this, and all of them get the rows.
    """
    state = PartialState()
    batches = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    mine: list[tuple[int, NDArray[np.float32]]] = []
    for first in range(0, len(batches), state.num_processes):
        if interrupted():
            return None
        # Every process measures a batch in every round, since a sharded model needs them all; the last one may come
        # more than once and is then the same.
        number = min(first + state.process_index, len(batches) - 1)
        rows = measure([examples[index] for index in batches[number]])
        mine.append((number, rows.float().cpu().numpy()))
    everyones: dict[int, NDArray[np.float32]] = dict(gather_object(mine))
    return np.concatenate([everyones[number] for number in range(len(batches))])
