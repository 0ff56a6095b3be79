"""Packed batches train as plain ones: losses and gradients against transformers' own passes over padded rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.collate import EncodedExample, EncodedPair, pack_examples, pad_right, token_ids
from rlhf.losses import pairwise_last_loss
from rlhf.models import freeze_bottom
from rlhf.pair_batches import pack_divergent, pack_pairs, pad_pairs
from rlhf.stages import reward, sft
from tests.benchmarks import training
from tests.fakes import MODELS, PAD_ID, tiny_llama, tiny_policy, tiny_reward_model

IGNORED = -100
EXAMPLES = [
    EncodedExample("a", prompt=token_ids([5, 6, 7, 40, 41]), response=token_ids([8, 9, 256])),
    EncodedExample("b", prompt=token_ids([10]), response=token_ids([11, 256])),
    EncodedExample("c", prompt=token_ids([12, 13, 14]), response=token_ids([256])),
]
PAIRS = [
    EncodedPair("a", token_ids([5, 6, 7, 40]), chosen=token_ids([8, 9, 256]), rejected=token_ids([9, 256])),
    EncodedPair("b", token_ids([10]), chosen=token_ids([11, 256]), rejected=token_ids([12, 13, 14, 256])),
    EncodedPair("c", token_ids([20, 21]), chosen=token_ids([256]), rejected=token_ids([22, 256])),
]
KINDS = pytest.mark.parametrize("kind", MODELS)
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of the trained weights."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Equal up to rounding of the largest entry."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max()), name


def plain_nll(policy: PreTrainedModel, *, loss_on: str) -> Tensor:
    """The summed loss as transformers has it, from labels."""
    rows = [token_ids([*example.prompt, *example.response]) for example in EXAMPLES]
    ids_BT, mask_BT = pad_right(rows, PAD_ID)
    labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
    for row, example in enumerate(EXAMPLES):
        labels_BT[row, : len(example.prompt) if loss_on == "summary" else 1] = IGNORED
    logits_BTV = policy(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")


@KINDS
@CHECKPOINTING
@pytest.mark.parametrize("loss_on", ["summary", "all"])
def test_sft_has_the_loss_and_gradients_of_transformers(kind: str, checkpointing: bool, loss_on: str) -> None:
    policy = MODELS[kind]().train()
    loss = plain_nll(policy, loss_on=loss_on)
    plain = gradients(policy, loss)
    sft.take_batches(policy)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    ours = -policy(pack_examples(EXAMPLES, loss_on=loss_on)).sum()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients(policy, ours), plain)


def test_a_policy_that_takes_batches_still_takes_what_it_took() -> None:
    policy, ids_BT = tiny_policy(), torch.tensor([[1, 2, 3]])
    before = policy(ids_BT).logits
    sft.take_batches(policy)
    assert torch.equal(policy(ids_BT).logits, before)
    assert torch.equal(policy.generate(ids_BT, max_new_tokens=2, do_sample=False)[:, :3], ids_BT)


@pytest.mark.parametrize("make", [tiny_policy, tiny_llama])
@CHECKPOINTING
@pytest.mark.parametrize("frozen", [0.0, 0.5])
def test_pairs_that_share_a_prompt_have_the_gradients_of_plain_ones(
    make: Callable[[], PreTrainedModel], checkpointing: bool, frozen: float
) -> None:
    model = tiny_reward_model(make()).train()
    freeze_bottom(model, frozen)
    reward.take_batches(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    padded = pad_pairs(PAIRS, pad_id=PAD_ID)
    scores_BT = model(padded)
    ends_B = scores_BT.gather(1, padded.mask_BT.sum(dim=1, keepdim=True) - 1).squeeze(1)
    loss = pairwise_last_loss(*ends_B.chunk(2)) * 3
    plain = gradients(model, loss)
    batch = pack_pairs(PAIRS)
    torch.testing.assert_close(model(batch), torch.stack(ends_B.chunk(2), dim=1).flatten(), atol=1e-5, rtol=1e-5)
    ours = reward.pair_loss(model, batch)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_same(gradients(model, ours), plain)


@CHECKPOINTING
def test_divergent_pairs_that_share_a_prompt_have_the_gradients_of_padded_ones(checkpointing: bool) -> None:
    model = tiny_reward_model().train()
    reward.take_batches(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = reward.pair_loss(model, pad_pairs(PAIRS, pad_id=PAD_ID))
    plain = gradients(model, loss)
    ours = reward.pair_loss(model, pack_divergent(PAIRS, pad_id=PAD_ID))
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_same(gradients(model, ours), plain)


def test_scores_of_divergent_pairs_are_those_of_padded_rows() -> None:
    model = tiny_reward_model()
    packed, padded = pack_divergent(PAIRS, pad_id=PAD_ID), pad_pairs(PAIRS, pad_id=PAD_ID)
    scores_BR = reward.batch_scores(model, packed)[packed.read_BR]
    scores_BT = reward.batch_scores(model, padded)
    for row, pair in enumerate([*PAIRS, *PAIRS]):
        # From the summary's first token to the end of the longer one, padding included.
        first, count = len(pair.prompt), max(len(pair.chosen), len(pair.rejected))
        torch.testing.assert_close(scores_BR[row, :count], scores_BT[row, first : first + count], atol=1e-5, rtol=1e-5)


def test_only_gptj_packs_divergent_pairs() -> None:
    kinds = {
        make: type(reward.collator(tiny_reward_model(make()), "divergent", pad_id=PAD_ID)(PAIRS)).__name__
        for make in (tiny_policy, tiny_llama)
    }
    assert kinds == {tiny_policy: "DivergentPairs", tiny_llama: "PaddedPairs"}


@pytest.mark.parametrize("stage", training.WAYS)
def test_the_benchmark_compares_the_same_training(stage: str) -> None:
    sizes = "--layers 2 --hidden 32 --heads 2 --rotary 8 --vocabulary 50 --rows 3 --prompt 12 --response 6 --repeats 1"
    options = training.parser().parse_args([*sizes.split(), "--frozen", "0.5"])
    found = training.compare(training.WAYS[stage](options), options)
    assert found["packed_loss"] == pytest.approx(found["plain_loss"], rel=1e-5)
    assert found["packed_gradient"] == pytest.approx(found["plain_gradient"], rel=1e-5)
    assert found["packed_megabytes"] < found["plain_megabytes"]
