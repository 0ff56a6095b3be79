"""The reward model on token ids: PPO, prepare, evaluate and the service all score through here.

Shapes: B sequences, T tokens, H hidden. Masks are True where a token counts; padding may stand on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import PrerequisiteError, RlhfError
from rlhf.models import position_ids, score_shift
from rlhf.prompt import PROMPT_VERSION, TRLX_VERSION
from rlhf.sequences import check_sequences, max_positions


@dataclass(frozen=True)
class Framing:
    """What a reward model reads for a prompt and its response: `prefix_ids` before them, nothing from `stop_id` on.

    The default is the pipeline's own: prompt, response and EOS as they are.
    """

    prefix_ids: tuple[int, ...] = ()
    stop_id: int | None = None

    def apply(self, sequence: Sequence[int]) -> Sequence[int]:
        """The ids to be read, the score standing at the last of them."""
        if self.stop_id is not None and self.stop_id in sequence:
            sequence = sequence[: sequence.index(self.stop_id)]
        return [*self.prefix_ids, *sequence] if self.prefix_ids else sequence


def framing_of(config: PretrainedConfig) -> Framing:
    """How a reward model of this config is to be fed, by its prompt_version.

    trlX appends EOS to every summary, whether it ended or not, pads with EOS, and reads the score before the first
    of them: so both kinds of summary are scored at their last token of text.
    Raises PrerequisiteError for a version that is not known, and for one whose ids the config lacks.
    """
    version = getattr(config, "prompt_version", PROMPT_VERSION)
    if version == PROMPT_VERSION:
        return Framing()
    if version != TRLX_VERSION:
        raise PrerequisiteError(
            f"the reward model's prompt_version is {version!r}, and this release knows {PROMPT_VERSION!r} and "
            f"{TRLX_VERSION!r}; use the release that made it"
        )
    prefix_ids, stop_id = getattr(config, "score_prefix_ids", None) or [], config.eos_token_id
    if not prefix_ids or not all(type(token) is int and token >= 0 for token in [*prefix_ids, stop_id]):
        raise PrerequisiteError(
            f"the reward model's config has prompt_version {version!r} without the token ids that go with it, "
            "score_prefix_ids and eos_token_id; run `rlhf import-model` again"
        )
    return Framing(tuple(prefix_ids), stop_id)


def scorable_tokens(model: PreTrainedModel) -> int | None:
    """Tokens that a prompt and its response may have together; None where the model sets no limit."""
    positions = max_positions(model)
    return None if positions is None else positions - len(framing_of(model.config).prefix_ids)


class Scorer:
    """Scores token sequences, prompt and response ids each, in batches of like length.

    What the model reads for them follows from the prompt version in its config: see `framing_of`.
    """

    def __init__(self, model: PreTrainedModel, *, pad_id: int, batch_tokens: int) -> None:
        """batch_tokens bounds a batch's tokens, padding included; a longer sequence goes alone."""
        self._model = model
        self._framing = framing_of(model.config)
        if self._framing.prefix_ids:
            check_sequences([self._framing.prefix_ids], model, kind="score_prefix_ids")
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
        sequences = self._framed(sequences)
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

    def _framed(self, sequences: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """What the model reads for each, none longer than its positions."""
        check_sequences(sequences, self._model, kind="sequence")
        framed, before = [self._framing.apply(sequence) for sequence in sequences], len(self._framing.prefix_ids)
        positions = max_positions(self._model)
        for number, sequence in enumerate(framed):
            if positions is not None and len(sequence) > positions:
                raise ValueError(
                    f"sequence {number} has {len(sequence) - before} tokens after the {before} of the reward model's "
                    f"own, together more than its {positions} positions; cut it to {positions - before}"
                )
        return framed

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
    return _read(_head(model), _hidden(model, ids_BT, mask_BT))


def last_scores(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The head at each row's last counted token: scores_B, raw, with gradients."""
    last_B = mask_BT.shape[1] - 1 - mask_BT.long().flip(1).argmax(dim=1)
    rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
    return _read(_head(model), _hidden(model, ids_BT, mask_BT)[rows_B, last_B])


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


def _read(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Scores in the precision of the head's weight, whatever autocast says.

    Differences of scores are what is trained and told, and bfloat16 knows only every hundredth between 1 and 2.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = head(hidden.to(head.weight.dtype)).squeeze(-1)
    return scores


def _head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns a hidden state into a score. Raises ValueError where there is none."""
    for child in model.children():
        if isinstance(child, nn.Linear) and child.out_features == model.config.num_labels == 1:
            return child
    raise ValueError(f"{type(model).__name__} has no score head with one label; use a model that `rlhf reward` made")
