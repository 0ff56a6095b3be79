"""The reward model on token ids: PPO, prepare, evaluate and the service all score through here.

Shapes: B sequences, T tokens, H hidden. Masks are True where a token counts; padding may stand on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import RlhfError
from rlhf.models import position_ids, score_shift
from rlhf.sequences import check_sequences


class Scorer:
    """Scores token sequences in batches of like length."""

    def __init__(self, model: PreTrainedModel, *, pad_id: int, batch_tokens: int) -> None:
        """batch_tokens bounds a batch's tokens, padding included; a longer sequence goes alone."""
        self._model = model
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        on_progress: Callable[[int], None] | None = None,
        allow_nonfinite: bool = False,
    ) -> Tensor:
        """One score a sequence, the shift applied: [B] float32 on the CPU, in the order given.

        A score does not depend on what it is batched with. on_progress hears after each batch how many
        are done. Raises ValueError for a sequence that the model cannot take, and RlhfError naming the
        sequences whose score is not finite, unless allow_nonfinite passes such scores on.
        """
        check_sequences(sequences, self._model, kind="sequence")
        scores_B = torch.empty(len(sequences), dtype=torch.float32)
        done = 0
        for batch in length_batches([len(sequence) for sequence in sequences], self._batch_tokens):
            scores_B[batch] = self._score_batch([sequences[index] for index in batch])
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
        wrong = (~scores_B.isfinite()).nonzero().squeeze(1).tolist()
        if wrong and not allow_nonfinite:
            shown = ", ".join(map(str, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise RlhfError(
                f"the reward model's score is not finite for {len(wrong)} of {len(sequences)} sequences "
                f"(numbers {shown}); train it again, or use runtime.precision: float32"
            )
        return scores_B

    @torch.no_grad()
    def _score_batch(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        lengths_B = torch.tensor([len(sequence) for sequence in sequences])
        width = int(lengths_B.max())
        ids_BT = torch.tensor([[*sequence, *[self._pad_id] * (width - len(sequence))] for sequence in sequences])
        mask_BT = torch.arange(width) < lengths_B[:, None]
        device = self._model.device
        scores_B = last_scores(self._model, ids_BT.to(device), mask_BT.to(device))
        return scores_B.float().cpu() - score_shift(self._model)


def token_scores(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The head on the final hidden state at each position: scores_BT, raw, with gradients."""
    return _head(model)(_hidden(model, ids_BT, mask_BT)).squeeze(-1)


def last_scores(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The head at each row's last counted token: scores_B, raw, with gradients."""
    last_B = mask_BT.shape[1] - 1 - mask_BT.long().flip(1).argmax(dim=1)
    rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
    return _head(model)(_hidden(model, ids_BT, mask_BT)[rows_B, last_B]).squeeze(-1)


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of like length, each of at most batch_tokens padded tokens, the longest first.

    A sequence longer than batch_tokens is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # The first of a batch is its longest, to which the others are padded.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _hidden(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    output = model.base_model(
        input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=position_ids(mask_BT), use_cache=False
    )
    hidden_BTH: Tensor = output.last_hidden_state
    return hidden_BTH


def _head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns a hidden state into a score. Raises ValueError where there is none."""
    for child in model.children():
        if isinstance(child, nn.Linear) and child.out_features == model.config.num_labels == 1:
            return child
    raise ValueError(f"{type(model).__name__} has no score head with one label; use a model that `rlhf reward` made")
