"""A decoder's step as a CUDA graph: recorded once, then started by one call instead of a thousand.

Written without a GPU at hand and checked only as far as a CPU can: hence off unless asked for
(`BuiltinEngine(..., cuda_graphs=True)`), and tests/test_generation_gpu.py holds it against plain steps.

Shapes: A rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.block_linears import plain_linears

Advance = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Takes tokens_A; gives logits_AV and what entered a block, [A, H]. All else it reads and changes is in place."""

WARM_UP_STEPS = 2
"""Run before recording, so that cuBLAS and the allocator have what they need."""


class RecordedStep:
    """Does what `advance` does, for a fixed number of rows; what it gives is overwritten by the next call.

    state is what `advance` changes and would change once more by being tried out.
    """

    def __init__(self, advance: Advance, tokens_A: Tensor, *, state: Tensor) -> None:
        self._tokens_A = tokens_A.clone()
        before = state.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                advance(self._tokens_A)
                state.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # A thread beside, which scores, may take memory meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._given = advance(self._tokens_A)

    def __call__(self, tokens_A: Tensor) -> tuple[Tensor, Tensor | None]:
        """One more step."""
        self._tokens_A.copy_(tokens_A)
        self._graph.replay()
        return self._given


def can_record(model: PreTrainedModel) -> bool:
    """Whether a step of this model is kernels on a GPU and nothing else: no hooks, adapters or casts to be redone."""
    return model.device.type == "cuda" and not torch.is_autocast_enabled("cuda") and plain_linears(model)
