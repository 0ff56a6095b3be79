"""What is computed once: rows by hand, scores against transformers' own, and the tokens that reach the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import GPTJForSequenceClassification, PreTrainedModel

from rlhf.models import backbone, blocks
from rlhf.score_batches import MOST_ROW_TOKENS, Row, lone_rows, row_batches, shared_rows
from rlhf.scoring import Scorer
from tests.fakes import tiny_llama, tiny_reward_model

SHIFT = 0.25
PROMPT = list(range(10, 40))
OTHER = [200, *range(60, 80)]


def eager_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[float]:
    """transformers' GPT-J with the same weights, one sequence at a time."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "eager"
    plain = GPTJForSequenceClassification(config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return [float(plain(input_ids=torch.tensor([ids])).logits) - SHIFT for ids in sequences]


def milder_model() -> PreTrainedModel:
    """Scores of about 1, in which 1e-5 is a rounding error of float32."""
    model = tiny_reward_model(shift=SHIFT)
    with torch.no_grad():
        for weight in model.base_model.parameters():
            weight.mul_(0.25)
    return model


def computed_tokens(model: PreTrainedModel) -> list[tuple[int, int]]:
    """A list that grows with each pass: the tokens of the first block, and those that leave the last."""
    # Our own passes call a GPT-J's linear layers one by one, and the MLP that holds them never.
    first, last = (
        getattr(block.mlp, "fc_in", block.mlp) for block in (blocks(backbone(model))[0], blocks(backbone(model))[-1])
    )
    entered: list[int] = []
    passes: list[tuple[int, int]] = []
    first.register_forward_hook(lambda module, inputs, output: entered.append(output.shape[:-1].numel()))

    def left(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        passes.append((entered.pop(), output.shape[:-1].numel()))

    last.register_forward_hook(left)
    return passes


def scorer(model: PreTrainedModel, batch_tokens: int = 10_000) -> Scorer:
    return Scorer(model, batch_tokens=batch_tokens)


CASES: dict[str, tuple[list[list[int]], tuple[int, int]]] = {
    # Sequences, then the tokens computed in all blocks but the last, and in the last.
    "a pair": ([[*PROMPT, 1, 2, 3], [*PROMPT, 4, 5]], (30 + 3 + 2, 2)),
    "four candidates": ([[*PROMPT, *([n] * (n + 1))] for n in range(4)], (30 + 1 + 2 + 3 + 4, 4)),
    "one goes on from another": ([PROMPT, [*PROMPT, 5, 6]], (29 + 1 + 3, 2)),
    "the same twice": ([[*PROMPT, 1], [*PROMPT, 1], [*PROMPT, 2], [*PROMPT, 1]], (30 + 1 + 1, 2)),
    "nothing in common": ([[*PROMPT, 1], [*OTHER, 1]], (31 + 22, 2)),
    "too little in common": ([[7, 8, *PROMPT], [7, 8, *OTHER]], (32 + 23, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_in_common_is_computed_once_and_scored_as_alone(case: str) -> None:
    sequences, (tokens, read) = CASES[case]
    model = milder_model()
    passes = computed_tokens(model)
    found = scorer(model).score(sequences)
    assert found.tolist() == pytest.approx(eager_scores(model, sequences), abs=1e-5)
    assert passes == [(tokens, read)]


def test_pairs_candidates_and_others_are_scored_together_in_any_order() -> None:
    sequences = [[*start, *ids] for start in (PROMPT, OTHER, [9]) for ids in ([1], [2, 3], [4, 5, 6], [2, 9, 9])]
    model = milder_model()
    expected = dict(zip(map(tuple, sequences), eager_scores(model, sequences), strict=True))
    for order in (sequences, sequences[::-1], sequences[::3] + sequences):
        for batch_tokens in (1, 70, 10_000):
            found = scorer(model, batch_tokens).score(order).tolist()
            assert found == pytest.approx([expected[tuple(ids)] for ids in order], abs=1e-5)


def test_a_score_that_is_no_number_stays_alone_in_its_row() -> None:
    model = milder_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.nan
    sequences = [[*PROMPT, 1, 2], [*PROMPT, 3, 7, 4], [*PROMPT, 5]]
    found = scorer(model).score(sequences, allow_nonfinite=True).tolist()
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx(eager_scores(model, [sequences[0], sequences[2]]), abs=1e-5)


def test_architectures_that_cannot_share_get_padded_batches_within_the_bound() -> None:
    # 32 and 31 tokens are 2 x 32 padded, which 64 allow and 63 do not.
    sequences = [[*PROMPT, 1, 2], [*PROMPT, 3]]
    model = tiny_reward_model(tiny_llama(), shift=SHIFT)
    passes = computed_tokens(model)
    scorer(model, 64).score(sequences)
    scorer(model, 63).score(sequences)
    assert passes == [(64, 64), (32, 32), (31, 31)]


def test_rows_by_hand() -> None:
    sequences = [(9,) * 40, (5,) * 40, (9,) * 41, (5,) * 20 + (6,) * 20, (7,)]
    # In the order of their tokens: 1, 3, 4, 0, 2.
    assert shared_rows(sequences, hidden=1000) == [
        Row((1, 3), 20, 60),
        Row((4,), 0, 1),
        Row((0, 2), 39, 39 + 1 + 2),
    ]
    # Narrow models pay for pairs of tokens rather than for tokens: of 40² / 2 each alone to 60² under a mask.
    assert shared_rows(sequences, hidden=4)[0] == Row((1,), 0, 40)
    assert lone_rows(sequences)[2] == Row((2,), 0, 41)


def test_a_row_grows_no_longer_than_its_mask_may() -> None:
    prompt = (1,) * 500
    sequences = [(*prompt, number, *([2] * 99)) for number in range(3, 33)]
    rows = shared_rows(sequences, hidden=4096)
    assert [len(row.members) for row in rows] == [15, 15]
    assert all(row.common == 500 and row.tokens == 500 + 15 * 100 <= MOST_ROW_TOKENS for row in rows)


def test_shared_rows_are_batched_apart_and_by_the_tokens_they_compute() -> None:
    pair, lone = Row((0, 1), 30, 35), Row((2,), 0, 33)
    assert row_batches([lone, pair], tokens=100, grid=100) == [[pair], [lone]]
    other = Row((3, 4), 30, 40)
    assert row_batches([pair, other], tokens=75, grid=80) == [[other, pair]]
    assert row_batches([pair, other], tokens=74, grid=80) == [[other], [pair]]
    assert row_batches([pair, other], tokens=75, grid=79) == [[other], [pair]]
