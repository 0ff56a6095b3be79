"""How any causal LM is run token by token: the interface, and which of our decoders runs which model.

Shapes: A rows in use, N rows that join, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from rlhf import gptj_decoder
from rlhf.gptj_decoder import GptjDecoder
from rlhf.kv_cache import Decoder
from rlhf.trunk_states import TrunkStates


class RowDecoder(Protocol):
    """A batch on its way through a model, one row a sequence; rows join and leave between any two tokens."""

    def __len__(self) -> int:
        """Rows in use."""
        ...

    def join(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Let these follow the rows in use; gives logits_NV of each one's first token, float32."""
        ...

    def step(self, tokens_A: Tensor) -> Tensor:
        """Append a token to each row in use; gives logits_AV of the token after it, float32."""
        ...

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Take rows out; gives, for each row in use then, its place before."""
        ...


def open_decoder(
    model: PreTrainedModel,
    *,
    rows: int,
    pad_id: int,
    fixed_steps: int = 0,
    trunk: TrunkStates | None = None,
    cuda_graphs: bool = False,
) -> RowDecoder:
    """The fastest decoder that runs this model, for at most this many rows.

    fixed_steps: the weights stay as they are for so many steps, then the decoder is given up; 0 where they may change.
    trunk: for what `keeps_trunk`, where the hidden states that enter a block are kept; rows then join once.
    cuda_graphs: rows join once and none leaves, so that a step can be recorded, where a decoder and the device do that.
    """
    if keeps_trunk(model):
        return GptjDecoder(model, rows=rows, fixed_steps=fixed_steps, trunk=trunk, cuda_graphs=cuda_graphs)
    assert trunk is None, "only GPT-J's decoder keeps states"
    return Decoder(model, rows=rows, pad_id=pad_id)


def keeps_trunk(model: PreTrainedModel) -> bool:
    """Whether this model's decoder can keep what enters a block."""
    return gptj_decoder.fits(model)
