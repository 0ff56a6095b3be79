"""The hidden states that enter one block, kept of every token while a batch is written.

PPO trains the blocks above only, so with these the blocks below need not run again.

Shapes: B sequences, A rows in use, M tokens of a pass, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TrunkStates:
    """A buffer in which each sequence has room for its prompt and all but the last of `room` new tokens.

    layers is how many blocks have run on what is kept.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], *, layers: int, room: int) -> None:
        self.layers = layers
        self._prompts = [len(prompt) for prompt in prompts]
        ends = torch.tensor([length + room - 1 for length in self._prompts]).cumsum(0)
        self._starts = [0, *ends[:-1].tolist()]
        self._tokens = int(ends[-1])
        self._states: Tensor | None = None
        self._places_A = torch.tensor([start + n for start, n in zip(self._starts, self._prompts, strict=True)])

    def begin(self, states_MH: Tensor, spans: Sequence[range]) -> None:
        """Take the prompts' states; spans says for each sequence which of the tokens are its own."""
        device = states_MH.device
        self._states = states_MH.new_empty(self._tokens, states_MH.shape[1])
        for start, span in zip(self._starts, spans, strict=True):
            self._states[start : start + len(span)] = states_MH[span.start : span.stop]
        self._places_A = self._places_A.to(device)

    def add(self, states_AH: Tensor) -> None:
        """Take the states of one more token a row in use; a row that goes on after its end writes within its room."""
        assert self._states is not None, "the prompts come first"
        self._states.index_copy_(0, self._places_A, states_AH)
        self._places_A += 1

    def leave(self, order: Sequence[int]) -> None:
        """The rows in use are these of those before."""
        self._places_A = self._places_A[order]

    def of_sequences(self, response_lengths: Sequence[int]) -> list[Tensor]:
        """States of each prompt and its response without the last token, [tokens, H]: views of the buffer."""
        assert self._states is not None, "the prompts come first"
        counts = [prompt + response - 1 for prompt, response in zip(self._prompts, response_lengths, strict=True)]
        return [self._states[start : start + count] for start, count in zip(self._starts, counts, strict=True)]
