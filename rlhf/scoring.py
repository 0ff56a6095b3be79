"""The reward model on token ids: PPO, prepare, evaluate and the service all score through here.

Shapes: B sequences, T tokens, K tokens whose score is read, H hidden. Masks are True where a token counts; padding may
stand on either side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import PrerequisiteError, RlhfError
from rlhf.forward import hidden_states
from rlhf.gptj import is_gptj
from rlhf.models import position_ids, score_shift
from rlhf.packing import pack_groups
from rlhf.prompt import PROMPT_VERSION, TRLX_VERSION
from rlhf.score_batches import Row, lone_rows, row_batches, shared_rows
from rlhf.sequences import check_sequences, max_positions

Ids = tuple[int, ...]

GRID_FACTOR = 1.5
"""The attention's grid, padding included, may have so many times a batch's tokens."""

CPU_BATCH_TOKENS = 1024
"""A CPU takes no more at a time: what a layer makes of them stays in its caches (a tenth faster than 16,384)."""


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
    """Scores token sequences, prompt and response ids each, without padding, and what they have in common once.

    What the model reads for them follows from the prompt version in its config: see `framing_of`. Batches wait for
    each other on the device only; the host waits once, for the scores.
    """

    def __init__(self, model: PreTrainedModel, *, batch_tokens: int) -> None:
        """batch_tokens bounds the tokens computed at a time; a longer sequence goes alone. On a CPU fewer will do."""
        self._model = model
        self._framing = framing_of(model.config)
        if self._framing.prefix_ids:
            check_sequences([self._framing.prefix_ids], model, kind="score_prefix_ids")
        self._batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS) if self.device.type == "cpu" else batch_tokens

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @cached_property
    def side_stream(self) -> torch.cuda.Stream:
        """For scoring beside other work on a GPU; one for good, since the allocator keeps freed memory by stream."""
        return torch.cuda.Stream(self.device)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        on_progress: Callable[[int], None] | None = None,
        allow_nonfinite: bool = False,
    ) -> Tensor:
        """One score a sequence, the shift applied: [B] float32 on the CPU, in the order given.

        Equal sequences are computed once, and a beginning that several have in common is where that pays. A score
        does not depend on what it is batched with. on_progress hears after each batch how many are done. Raises
        ValueError for a sequence that the model cannot take, and RlhfError naming the sequences whose score is not
        finite, unless allow_nonfinite passes such scores on.
        """
        places: dict[Ids, int] = {}
        numbers_B = [places.setdefault(tuple(ids), len(places)) for ids in self._framed(sequences)]
        counts, done = Counter(numbers_B), 0

        def tell(numbers: Sequence[int]) -> None:
            nonlocal done
            done += sum(counts[number] for number in numbers)
            if on_progress is not None:
                on_progress(done)

        scores_B = self._distinct(list(places), tell)[numbers_B]
        wrong = (~scores_B.isfinite()).nonzero().squeeze(1).tolist()
        if wrong and not allow_nonfinite:
            shown = ", ".join(map(str, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise RlhfError(
                f"the reward model's score is not finite for {len(wrong)} of {len(scores_B)} sequences "
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

    def _distinct(self, sequences: Sequence[Ids], tell: Callable[[Sequence[int]], None]) -> Tensor:
        """Scores of sequences that all differ; tell hears the numbers of those of each batch."""
        if not is_gptj(self._model.base_model):  # computed sequence by sequence, with padding, whatever they share
            return self._scores(sequences, lone_rows(sequences), self._batch_tokens, tell)
        grid = int(GRID_FACTOR * self._batch_tokens)
        rows = shared_rows(sequences, hidden=self._model.config.hidden_size)
        scores = self._scores(sequences, rows, grid, tell)
        # A weight of 0 times what is not finite is not finite: one sequence may have spoiled those of its row.
        finite = scores.isfinite().tolist()
        wrong = [number for row in rows if row.is_shared for number in row.members if not finite[number]]
        if wrong:
            again = [sequences[number] for number in wrong]
            scores[wrong] = self._scores(again, lone_rows(again), grid, lambda numbers: None)
        return scores

    def _scores(
        self, sequences: Sequence[Ids], rows: Sequence[Row], grid: int, tell: Callable[[Sequence[int]], None]
    ) -> Tensor:
        numbers: list[int] = []
        found = [torch.empty(0, device=self.device)]
        for batch in row_batches(rows, tokens=self._batch_tokens, grid=grid):
            found.append(self._score_rows(sequences, batch))
            members = [number for row in batch for number in row.members]
            numbers += members
            tell(members)
        scores = torch.empty(len(sequences))
        scores[numbers] = torch.cat(found).cpu() - score_shift(self._model)
        return scores

    @torch.no_grad()
    def _score_rows(self, sequences: Sequence[Ids], rows: Sequence[Row]) -> Tensor:
        """Raw scores, float32 on the model's device, of the rows' members in order."""
        packed = pack_groups(
            [sequences[row.members[0]][: row.common] for row in rows],
            [[sequences[number][row.common :] for number in row.members] for row in rows],
            keep=1,
        )
        hidden_KH = hidden_states(self._model.base_model, packed.to(self.device))
        return read_scores(self._model, hidden_KH).float()


def token_scores(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The head on the final hidden state at each position: scores_BT, raw, with gradients."""
    output = model.base_model(
        input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=position_ids(mask_BT), use_cache=False
    )
    return read_scores(model, output.last_hidden_state)


def read_scores(model: PreTrainedModel, hidden_KH: Tensor) -> Tensor:
    """The model's score head on final hidden states: scores_K, raw (no shift), with gradients; any leading shape.

    Computed in the precision of the head's weight, whatever autocast says: differences of scores are what is trained
    and told, and bfloat16 knows only every hundredth between 1 and 2. Raises ValueError for a model without such a
    head.
    """
    head = _head(model)
    with torch.autocast(hidden_KH.device.type, enabled=False):
        scores_K: Tensor = head(hidden_KH.to(head.weight.dtype)).squeeze(-1)
    return scores_K


def _head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns a hidden state into a score. Raises ValueError where there is none."""
    for child in model.children():
        if isinstance(child, nn.Linear) and child.out_features == model.config.num_labels == 1:
            return child
    raise ValueError(f"{type(model).__name__} has no score head with one label; use a model that `rlhf reward` made")
