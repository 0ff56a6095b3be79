"""What a model can take in: token ids of its vocabulary, and no more of them than it has positions."""

from __future__ import annotations

from collections.abc import Sequence

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
