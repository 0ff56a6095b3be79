"""PPO's networks with adapters: one branch is policy and reference, and nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.actor_critic import ActorCritic
from rlhf.adapters import adapter_weights, merged_weights
from rlhf.config import LoraConfig
from rlhf.errors import ConfigError
from rlhf.generation import BuiltinEngine
from rlhf.models import reward_model_from_policy
from rlhf.sampling import Sampling
from tests.fakes import EOS_ID, PAD_ID, tiny_gpt2
from tests.test_models import FAMILIES, PROMPT, RESPONSE, inputs, plain_logprobs, rows, tiny_gptj, tiny_llama

TARGETS = {"gpt_neox": ("query_key_value",)}
DEPTHS = pytest.mark.parametrize("unfrozen", [2, "all"])
families = pytest.mark.parametrize("family", FAMILIES)


def actor_with_adapters(policy: PreTrainedModel, *, unfrozen: int | str = 2, **settings: object) -> ActorCritic:
    targets = TARGETS.get(policy.config.model_type, ("q_proj", "v_proj"))
    lora = LoraConfig(rank=3, alpha=6.0, targets=targets)
    return ActorCritic(policy, unfrozen_layers=unfrozen, temperature=1.0, lora=lora, seed=4, **settings)


def evaluated(actor: ActorCritic) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference, in eval mode as rollouts are."""
    ids_BT, mask_BT = rows()
    batch = inputs(actor, ids_BT, mask_BT)
    return actor(*batch).logprobs_SR, actor.reference_logprobs(*batch)


def take_a_step(actor: ActorCritic) -> None:
    optimizer = torch.optim.SGD(actor.trainable_parameters(), lr=5.0)
    for _ in range(2):  # A has no gradient as long as B is zero
        optimizer.zero_grad()
        evaluated(actor)[0].sum().backward()
        optimizer.step()


@families
@DEPTHS
def test_kl_is_exactly_zero_and_an_update_reaches_the_policy_alone(
    family: Callable[[], PreTrainedModel], unfrozen: int | str
) -> None:
    plain_BR = plain_logprobs(family(), *rows(), PROMPT)
    counted_BR = rows()[1][:, PROMPT:].bool()
    actor = actor_with_adapters(family(), unfrozen=unfrozen)
    before_BR, reference_BR = evaluated(actor)
    assert torch.equal(before_BR, reference_BR)
    torch.testing.assert_close(before_BR[counted_BR], plain_BR[counted_BR], atol=1e-5, rtol=1e-5)
    take_a_step(actor)
    after_BR, still_BR = evaluated(actor)
    assert (after_BR - before_BR).abs().max() > 1e-3
    assert torch.equal(still_BR, reference_BR)
    merged = family()
    merged.load_state_dict(merged_weights(actor.policy, actor.policy.state_dict()))
    merged_BR = plain_logprobs(merged, *rows(), PROMPT)
    torch.testing.assert_close(merged_BR[counted_BR], after_BR[counted_BR], atol=1e-5, rtol=1e-5)


def test_the_adapters_of_the_top_blocks_and_the_value_head_are_trained() -> None:
    policy = tiny_gptj()
    actor = actor_with_adapters(policy)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    places = [f"transformer.h.{block}.attn.{layer}" for block in (2, 3) for layer in ("q_proj", "v_proj")]
    assert trained == {f"{place}.{part}.default.weight" for place in places for part in ("lora_A", "lora_B")}
    expected = {id(policy.get_parameter(name)) for name in trained} | {id(p) for p in actor.value_head.parameters()}
    assert {id(parameter) for parameter in actor.trainable_parameters()} == expected
    output = actor(*inputs(actor, *rows()))
    (output.logprobs_SR.sum() + output.values_SR.sum()).backward()
    assert {id(parameter) for parameter in actor.parameters() if parameter.grad is not None} == expected


def test_adapters_of_all_blocks_leave_no_trunk() -> None:
    policy = tiny_gptj()
    actor = actor_with_adapters(policy, unfrozen="all")
    assert len(adapter_weights(policy.state_dict())) == 4 * 2 * 2
    trunk_NH, packed, _ = inputs(actor, *rows())
    assert trunk_NH.shape == (len(packed.ids_N), 0)


@DEPTHS
def test_nothing_is_copied_for_the_reference(unfrozen: int | str) -> None:
    policy = tiny_llama(tied=True)
    whole = sum(parameter.numel() for parameter in policy.parameters())
    actor = actor_with_adapters(policy, unfrozen=unfrozen)
    assert actor.reference is None
    added = sum(p.numel() for p in actor.trainable_parameters())
    assert sum(parameter.numel() for parameter in actor.parameters()) == whole + added
    assert policy.lm_head.weight is policy.model.embed_tokens.weight  # it is frozen, so that the tie can stay
    assert not policy.lm_head.weight.requires_grad


def test_a_seed_gives_the_same_policy() -> None:
    first, second = actor_with_adapters(tiny_gptj()), actor_with_adapters(tiny_gptj())
    for name, tensor in first.policy.state_dict().items():
        assert torch.equal(tensor, second.policy.state_dict()[name])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(actor: ActorCritic) -> list[Tensor]:
        take_a_step(actor)
        actor.zero_grad()
        actor.train()
        evaluated(actor)[0].sum().backward()
        return [parameter.grad for parameter in actor.policy.parameters() if parameter.grad is not None]

    checkpointed = actor_with_adapters(tiny_gptj())
    checkpointed.policy.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(actor_with_adapters(tiny_gptj()))
    assert len(expected) == 2 * 2 * 2
    torch.testing.assert_close(gradients(checkpointed), expected)


def test_generation_is_by_the_policy_also_after_the_reference_ran() -> None:
    actor = actor_with_adapters(tiny_gptj())
    take_a_step(actor)
    evaluated(actor)
    generation = BuiltinEngine(actor.policy, eos_id=EOS_ID, pad_id=PAD_ID).generate(
        [[5, 6, 7], [8, 9]], Sampling(max_new_tokens=RESPONSE, temperature=1.0), generator=torch.Generator()
    )
    ids_BT = torch.cat([torch.tensor([[5, 6, 7], [1, 8, 9]]), generation.response_BR], dim=1)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 0] = 0
    with torch.no_grad():
        logprobs_BR = actor(*inputs(actor, ids_BT, mask_BT, prompt=3)).logprobs_SR
    torch.testing.assert_close(generation.logprobs_BR, logprobs_BR, atol=1e-5, rtol=1e-5)


def test_frozen_weights_in_half_precision_leave_the_adapters_in_float32() -> None:
    actor = actor_with_adapters(tiny_llama(), frozen_dtype=torch.bfloat16)
    assert {p.dtype for p in actor.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in actor.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        policy_BR, reference_BR = evaluated(actor)
    assert torch.equal(policy_BR, reference_BR)


def test_a_separate_value_network_is_trained_whole(tmp_path: Path) -> None:
    tiny_gptj(0).save_pretrained(tmp_path)
    value_model = reward_model_from_policy(tmp_path, seed=0)
    actor = actor_with_adapters(tiny_gptj(1), value_model=value_model)
    actor(*inputs(actor, *rows())).values_SR.sum().backward()
    assert all(parameter.grad is not None for parameter in value_model.parameters())
    assert sum(p.numel() for p in actor.trainable_parameters()) > sum(p.numel() for p in value_model.parameters())


def test_without_a_rank_adapters_are_off() -> None:
    def built(lora: LoraConfig | None) -> ActorCritic:
        torch.manual_seed(0)
        return ActorCritic(tiny_gptj(), unfrozen_layers=2, temperature=1.0, lora=lora)

    plain, off = built(None).state_dict(), built(LoraConfig()).state_dict()
    assert plain.keys() == off.keys()
    assert any(name.startswith("reference.") for name in plain)
    assert all(torch.equal(plain[name], off[name]) for name in plain)


def test_what_does_not_fit_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"ppo.lora.targets=\[q_proj, v_proj\]: .* they have c_attn, c_fc, c_proj"):
        actor_with_adapters(tiny_gpt2(), unfrozen="all")
    with pytest.raises(ValueError, match=r"ppo.unfrozen_layers=5 is not between 1 and"):
        actor_with_adapters(tiny_gptj(), unfrozen=5)
