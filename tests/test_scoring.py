"""Scores: those of transformers' own sequence classifier, however they are padded and batched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import PrerequisiteError, RlhfError
from rlhf.models import load_reward_model
from rlhf.score_batches import length_batches
from rlhf.scoring import Scorer, framing_of, scorable_tokens, token_scores
from tests.fakes import EOS_ID, MODELS, PAD_ID, POSITIONS, tiny_policy, tiny_reward_model

LENGTHS = (23, 1, 7, 40, 7, 90, 2)
SHIFT = 0.25


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_reward_model(MODELS[request.param](), shift=SHIFT)


def sequences_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def scorer(model: PreTrainedModel, batch_tokens: int = 100) -> Scorer:
    return Scorer(model, batch_tokens=batch_tokens)


def transformers_logit(model: PreTrainedModel, sequence: list[int]) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([sequence])).logits)


def padded(sequences: list[list[int]], left: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Each sequence after `left` pad tokens, in a row of `width`."""
    ids_BT = torch.full((len(sequences), width), PAD_ID)
    mask_BT = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (sequence, start) in enumerate(zip(sequences, left, strict=True)):
        ids_BT[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask_BT[row, start : start + len(sequence)] = True
    return ids_BT, mask_BT


def test_scores_are_transformers_logits_minus_the_shift(model: PreTrainedModel) -> None:
    sequences = sequences_of()
    scores_B = scorer(model).score(sequences)
    assert scores_B.dtype == torch.float32
    assert scores_B.device.type == "cpu"
    assert not scores_B.requires_grad
    expected = [transformers_logit(model, sequence) - SHIFT for sequence in sequences]
    assert scores_B.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 2) for score in expected}) > 4  # random scores differ enough to be told apart


def test_a_saved_model_keeps_its_shift(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = scorer(model).score(sequences_of())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(scorer(load_reward_model(tmp_path)).score(sequences_of()), expected)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_a_score_does_not_depend_on_its_company(model: PreTrainedModel, batch_tokens: int) -> None:
    sequences = sequences_of()
    alone = [float(scorer(model).score([sequence])) for sequence in sequences]
    assert scorer(model, batch_tokens).score(sequences).tolist() == pytest.approx(alone, abs=1e-4)
    assert scorer(model, batch_tokens).score(sequences[::-1]).tolist() == pytest.approx(alone[::-1], abs=1e-4)


def test_padding_on_either_side_changes_nothing(model: PreTrainedModel) -> None:
    sequences = sequences_of((5, 9, 12))
    expected = [transformers_logit(model, sequence) for sequence in sequences]
    for left in ([0, 0, 0], [15, 11, 8], [3, 2, 1]):
        ids_BT, mask_BT = padded(sequences, left, width=20)
        with torch.no_grad():
            scores_BT = token_scores(model, ids_BT, mask_BT)
        ends = [start + len(sequence) - 1 for start, sequence in zip(left, sequences, strict=True)]
        assert scores_BT[torch.arange(3), ends].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_pad_token_that_counts_is_read() -> None:
    # transformers' classifier would pass over a pad token at the end, which here is a token like any other.
    model = tiny_reward_model()
    counted, dropped = scorer(model).score([[5, 6, PAD_ID], [5, 6]]).tolist()
    with torch.no_grad():
        scores_BT = token_scores(model, torch.tensor([[5, 6, PAD_ID]]), torch.ones(1, 3, dtype=torch.bool))
    assert scores_BT[0, -1] - SHIFT == pytest.approx(counted, abs=1e-4)
    assert counted != pytest.approx(dropped, abs=1e-3)


def test_token_scores_read_each_prefix(model: PreTrainedModel) -> None:
    sequence = sequences_of((9,))[0]
    with torch.no_grad():
        scores_BT = token_scores(model, torch.tensor([sequence]), torch.ones(1, 9, dtype=torch.bool))
    expected = [transformers_logit(model, sequence[: end + 1]) for end in range(9)]
    assert scores_BT[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_scores_carry_gradients_for_training() -> None:
    model = tiny_reward_model()
    ids_BT, mask_BT = padded(sequences_of((5, 9)), [0, 0], width=9)
    token_scores(model, ids_BT, mask_BT).sum().backward()
    assert model.score.weight.grad is not None
    assert model.get_input_embeddings().weight.grad is not None


def test_the_head_reads_the_last_token_only() -> None:
    model = tiny_reward_model()
    shapes: list[tuple[int, ...]] = []
    model.score.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    scorer(model, 10_000).score(sequences_of((9, 4)))
    assert shapes == [(2, 32)]


def test_batches_are_of_like_length_and_bounded() -> None:
    # The longest first. Padded to the longest, 100 at most: 90 alone, 2 x 40 for 40 + 23, 4 x 7 for 7, 7, 2 and 1.
    assert length_batches(LENGTHS, tokens=100, grid=100) == [[5], [3, 0], [2, 4, 6, 1]]
    assert length_batches(LENGTHS, tokens=79, grid=79) == [[5], [3], [0, 2, 4], [6, 1]]
    # Added up, 100 at most: 90, 40 + 23 + 7 + 7 + 2 + 1 = 80; a grid of 150 leaves room for 3 x 40.
    assert length_batches(LENGTHS, tokens=100, grid=1000) == [[5], [3, 0, 2, 4, 6, 1]]
    assert length_batches(LENGTHS, tokens=100, grid=150) == [[5], [3, 0, 2], [4, 6, 1]]
    assert length_batches([5, 5, 5], tokens=1, grid=1) == [[0], [1], [2]]
    assert length_batches([], tokens=100, grid=100) == []


def test_progress_counts_sequences() -> None:
    heard: list[int] = []
    scorer(tiny_reward_model()).score([*sequences_of(), sequences_of()[1]], on_progress=heard.append)
    assert heard == [1, 4, 8]  # 90; 40, 23 and 7; 7, 2 and, twice, the same token


def test_no_sequences_no_scores() -> None:
    assert scorer(tiny_reward_model()).score([]).shape == (0,)


def test_scores_that_are_not_finite_are_named() -> None:
    model = tiny_reward_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.nan
    sequences = [[5, 6], [7, 6], [5], [6, 7]]
    with pytest.raises(RlhfError, match=r"not finite for 2 of 4 sequences \(numbers 1, 3\)") as caught:
        scorer(model).score(sequences)
    assert "\n" not in str(caught.value)
    scores_B = scorer(model).score(sequences, allow_nonfinite=True)
    assert scores_B.isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        ([], "sequence 1 is empty"),
        ([5, 260], "sequence 1 has token id 260, outside the model's vocabulary of 260"),
        ([5] * (POSITIONS + 1), "sequence 1 has 129 tokens, more than the model's 128 positions"),
    ],
)
def test_sequences_that_the_model_cannot_take(sequence: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        scorer(tiny_reward_model()).score([[5], sequence])


def test_a_model_without_a_score_head_is_refused() -> None:
    with pytest.raises(ValueError, match="no score head"):
        scorer(tiny_policy()).score([[5]])


def framed_model(prefix_ids: list[int] | None = None) -> PreTrainedModel:
    """A reward model that reads three tokens of its own before every prompt, as trlX's do with <|startoftext|>."""
    model = tiny_reward_model(shift=SHIFT)
    model.config.prompt_version = "trlx-tldr-1"
    model.config.score_prefix_ids = [60, 124, 62] if prefix_ids is None else prefix_ids
    return model


@pytest.mark.parametrize(
    ("sequence", "read"),
    [
        ([5, 6, 7, EOS_ID], [60, 124, 62, 5, 6, 7]),  # the summary ended
        ([5, 6, 7], [60, 124, 62, 5, 6, 7]),  # it did not
        ([5, EOS_ID, 7, EOS_ID], [60, 124, 62, 5]),  # trlX reads before the first
        ([EOS_ID], [60, 124, 62]),
    ],
)
def test_a_model_of_trlx_reads_its_own_format(sequence: list[int], read: list[int]) -> None:
    model = framed_model()
    expected = transformers_logit(model, read) - SHIFT
    for batch in ([sequence], [[9] * 40, sequence, [8]]):
        scores_B = scorer(model).score(batch)
        assert float(scores_B[batch.index(sequence)]) == pytest.approx(expected, abs=1e-4)


def test_the_pipelines_own_format_is_read_as_it_is() -> None:
    model = tiny_reward_model(shift=SHIFT)
    model.config.prompt_version = "tldr-1"
    sequence = [5, EOS_ID, 7, EOS_ID]
    assert float(scorer(model).score([sequence])) == pytest.approx(
        transformers_logit(model, sequence) - SHIFT, abs=1e-4
    )


def test_what_stands_before_the_prompt_takes_positions() -> None:
    model = framed_model()
    assert scorable_tokens(model) == POSITIONS - 3 == 125
    assert scorable_tokens(tiny_reward_model()) == POSITIONS
    scores_B = scorer(model).score([[5] * 125, [5] * 125 + [EOS_ID]])
    assert float(scores_B[0]) == pytest.approx(float(scores_B[1]), abs=1e-4)
    with pytest.raises(ValueError, match=r"sequence 1 has 126 tokens after the 3 .* its 128 positions; cut it to 125"):
        scorer(model).score([[5], [5] * 126])


def test_versions_and_ids_that_are_not_known() -> None:
    model = framed_model()
    model.config.prompt_version = "trlx-tldr-2"
    with pytest.raises(PrerequisiteError, match="prompt_version is 'trlx-tldr-2', and this release knows 'tldr-1'"):
        framing_of(model.config)
    with pytest.raises(PrerequisiteError, match=r"score_prefix_ids and eos_token_id; run `rlhf import-model` again"):
        scorer(framed_model(prefix_ids=[]))
    with pytest.raises(ValueError, match="score_prefix_ids 0 has token id 260, outside the model's vocabulary of 260"):
        scorer(framed_model(prefix_ids=[5, 260]))


@pytest.mark.parametrize("text", ["1", 1.5, True, -1])
def test_ids_that_are_none(text: object) -> None:
    with pytest.raises(PrerequisiteError, match="without the token ids that go with it"):
        framing_of(framed_model(prefix_ids=[5, text]).config)  # type: ignore[list-item]
