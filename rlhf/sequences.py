"""Token ids on their way into a model: what it can take, and how sequences lie side by side.

Shapes: B prompts, P prompt columns. Masks are True where a token counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a sequence may have; None where the model sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_sequences(sequences: Sequence[Sequence[int]], model: PreTrainedModel, *, kind: str, room: int = 0) -> None:
    """Raise ValueError naming the first sequence that the model cannot take, `kind` and number.

    room is how many tokens are to be generated after each.
    """
    vocabulary, positions = model.get_input_embeddings().num_embeddings, max_positions(model)
    for number, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(f"{kind} {number} is empty; give at least one token")
        if min(sequence) < 0 or max(sequence) >= vocabulary:
            wrong = next(token for token in sequence if not 0 <= token < vocabulary)
            raise ValueError(
                f"{kind} {number} has token id {wrong}, outside the model's vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
        if positions is not None and len(sequence) + room > positions:
            after = f" and {room} to generate" if room else ""
            raise ValueError(
                f"{kind} {number} has {len(sequence)} tokens{after}, more than the model's {positions} positions; "
                f"cut it to {max(positions - room, 0)}"
            )


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts side by side, their ends aligned: ids_BP (int64) and mask_BP (bool), on the CPU."""
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    starts_B = torch.tensor([width - len(prompt) for prompt in prompts])
    return ids_BP, torch.arange(width) >= starts_B[:, None]
