"""Our functions against numbers that trlX 0.7.0's own PPO trainer recorded, on a tiny GPT-J.

Two cases: `pad`, a pad token of its own, and `eos`, padding with EOS as trlX's summarize example does.
Where our choice differs from trlX's, the functions are given trlX's choice here, and a test that says so
by name shows the difference.
Shapes: B rollouts (8), P prompt columns (60), R response columns (23), T = P + R.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM

from rlhf.actor_critic import ActorCritic, ActorOutput
from rlhf.advantages import RunningMoments, gae, k1, token_rewards, whiten
from rlhf.losses import policy_loss, value_loss
from rlhf.packing import Packed
from rlhf.rollout import join

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Golden:
    case: dict
    arrays: dict[str, Tensor]
    weights: dict[str, Tensor]
    config: GPTJConfig

    @property
    def ids_BT(self) -> Tensor:
        return torch.cat([self.arrays["query"], self.arrays["response"]], dim=1)

    @property
    def trlx_mask_BT(self) -> Tensor:
        """What trlX lets be attended and counted: everything that is not the pad token's id."""
        return self.ids_BT != self.case["pad"]

    @property
    def response_start(self) -> int:
        return self.arrays["query"].shape[1]

    @property
    def loss_mask_BR(self) -> Tensor:
        return self.arrays["mask"].bool()

    @property
    def our_mask_BR(self) -> Tensor:
        """The tokens up to EOS, EOS included."""
        is_eos_BR = (self.arrays["response"] == self.case["eos"]).long()
        return is_eos_BR.cumsum(dim=1) - is_eos_BR == 0

    @property
    def trlx_kl_mask_BR(self) -> Tensor:
        """Tokens whose predecessor trlX counts: it masks the log-ratio by the state, not by the token."""
        return self.trlx_mask_BT[:, self.response_start - 1 : -1]

    @property
    def score_index_B(self) -> Tensor:
        """Where trlX puts the score: the last column it stored, past every token it counts."""
        return torch.minimum(self.loss_mask_BR.sum(dim=1) + 1, torch.tensor(self.loss_mask_BR.shape[1] - 1))


@pytest.fixture(scope="module", params=["pad", "eos"])
def golden(request: pytest.FixtureRequest, shared_data: Path) -> Golden:
    return load_golden(shared_data, request.param)


@pytest.fixture(scope="module")
def golden_pad(shared_data: Path) -> Golden:
    return load_golden(shared_data, "pad")


@pytest.fixture(scope="module")
def golden_eos(shared_data: Path) -> Golden:
    return load_golden(shared_data, "eos")


def load_golden(shared_data: Path, name: str) -> Golden:
    folder = shared_data / "trlx-golden"
    with np.load(folder / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return Golden(
        case=json.loads((folder / f"{name}.json").read_text()),
        arrays=tensors,
        weights=load_file(folder / f"{name}-weights.safetensors"),
        config=GPTJConfig.from_pretrained(folder),
    )


def load_actor(golden: Golden) -> ActorCritic:
    policy = GPTJForCausalLM._from_config(golden.config, attn_implementation="eager").eval()
    policy.load_state_dict(part(golden.weights, "base_model."))
    actor = ActorCritic(policy, unfrozen_layers=2, temperature=1.0)
    actor.value_head.layers.load_state_dict(part(golden.weights, "v_head."))
    frozen = part(golden.weights, "frozen_head.")
    actor.reference.top.h.load_state_dict(part(frozen, "decoder_blocks."))
    actor.reference.top.ln_f.load_state_dict(part(frozen, "final_norm."))
    actor.reference.lm_head.load_state_dict(part(frozen, "lm_head."))
    return actor


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def run_actor(golden: Golden, actor: ActorCritic) -> ActorOutput:
    return actor(*inputs(golden, actor))


def inputs(golden: Golden, actor: ActorCritic) -> tuple[Tensor, Packed, Tensor]:
    """What the actor takes: prompts without their padding, responses with it, since trlX's losses read it."""
    start = golden.response_start
    masks_BP = golden.trlx_mask_BT[:, :start].bool()
    prompts = [ids_P[mask_P].tolist() for ids_P, mask_P in zip(golden.ids_BT[:, :start], masks_BP, strict=True)]
    batch = join(prompts, golden.ids_BT[:, start:].tolist(), device=golden.ids_BT.device)
    return actor.trunk_states(batch.packed), batch.packed, batch.tokens_K


def recorded_losses(golden: Golden, output: ActorOutput) -> tuple[Tensor, Tensor, dict, dict]:
    hyper, arrays = golden.case["hyper"], golden.arrays
    policy, policy_stats = policy_loss(
        output.logprobs_SR,
        arrays["old_logprobs"],
        arrays["advantages_whitened"],
        golden.loss_mask_BR,
        clip=hyper["cliprange"],
    )
    value, value_stats = value_loss(
        output.values_SR,
        arrays["old_values"],
        arrays["returns"],
        golden.loss_mask_BR,
        clip=hyper["cliprange_value"],
    )
    return policy, value, policy_stats, value_stats


def assert_close(ours: Tensor | float, recorded: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(ours).float(), torch.as_tensor(recorded).float(), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_logprobs_and_values_under_the_recorded_weights(golden: Golden) -> None:
    """Up to EOS: past it no token counts, and trlX numbers the positions of padding differently."""
    output = run_actor(golden, load_actor(golden))
    counted_BR = golden.our_mask_BR
    assert_close(output.logprobs_SR[counted_BR], golden.arrays["new_logprobs"][counted_BR])
    assert_close(output.values_SR[counted_BR], golden.arrays["new_values"][counted_BR])


def test_token_rewards_from_scores_and_the_reference_branch(golden: Golden) -> None:
    """The stored rewards hold -0.1 * (old logprobs - reference logprobs) and the clipped, scaled scores."""
    hyper, arrays = golden.case["hyper"], golden.arrays
    actor = load_actor(golden)
    reference_BR = actor.reference_logprobs(*inputs(golden, actor))
    clipped_B = arrays["raw_scores"][0].clamp(-hyper["cliprange_reward"], hyper["cliprange_reward"])
    _, deviation = RunningMoments().update(clipped_B)
    rewards_BR = token_rewards(
        clipped_B / deviation,
        k1(arrays["old_logprobs"], reference_BR),
        golden.trlx_kl_mask_BR,
        kl_coef=hyper["beta"],
        score_index_B=golden.score_index_B,
    )
    assert_close(rewards_BR, arrays["rewards"])


def test_running_deviation_over_both_chunks_of_scores(golden: Golden) -> None:
    limit = golden.case["hyper"]["cliprange_reward"]
    moments = RunningMoments()
    for scores_B in golden.arrays["raw_scores"]:
        moments.update(scores_B.clamp(-limit, limit))
    assert moments.std == pytest.approx(golden.case["running_std"], abs=TOLERANCE)


def test_advantages_whitening_and_returns(golden: Golden) -> None:
    hyper, arrays = golden.case["hyper"], golden.arrays
    everything_BR = torch.ones_like(golden.loss_mask_BR)
    advantages_BR, returns_BR = gae(
        arrays["rewards"], arrays["old_values"], everything_BR, gamma=hyper["gamma"], lam=hyper["lam"]
    )
    assert_close(returns_BR, arrays["returns"])
    assert_close(whiten(advantages_BR, everything_BR), arrays["advantages_whitened"])


def test_loss_its_parts_and_the_gradient_norm(golden: Golden) -> None:
    """The norm is over the top two blocks, the final norm, the LM head and the value head."""
    actor = load_actor(golden)
    policy, value, policy_stats, value_stats = recorded_losses(golden, run_actor(golden, actor))
    loss = policy + golden.case["hyper"]["vf_coef"] * value
    assert_close(policy, golden.case["pg_loss"])
    assert_close(value, golden.case["vf_loss"])
    assert_close(loss, golden.case["loss"])
    assert_close(policy_stats["ratio"], golden.case["stats"]["ratio"])
    assert_close(policy_stats["clip_fraction"], golden.case["stats"]["policy/clipfrac"])
    assert_close(value_stats["clip_fraction"], golden.case["stats"]["values/clipfrac"])
    assert_close(value_stats["error"], golden.case["stats"]["values/values_error"])

    loss.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in actor.trainable_parameters()])
    assert_close(norms.norm(), golden.case["grad_norm"])


def test_trlx_puts_the_score_past_eos_we_put_it_on_eos(golden: Golden) -> None:
    """Row 0 is two tokens and EOS, in column 2."""
    no_kl_BR = torch.zeros(8, 23)
    ours_BR = token_rewards(torch.ones(8), no_kl_BR, golden.our_mask_BR, kl_coef=0.0)
    assert ours_BR[0].nonzero().tolist() == [[2]]
    trlx_column = int(golden.arrays["rewards"][0].abs().argmax())
    assert trlx_column == {"pad": 4, "eos": 3}[golden.case["mode"]]


def test_trlx_masks_eos_out_of_the_loss_we_keep_it(golden_eos: Golden) -> None:
    """Rows 1 and 7 are EOS alone: trlX learns nothing from them, we learn that EOS was right or wrong."""
    assert golden_eos.loss_mask_BR.sum(dim=1).tolist() == [2, 0, 1, 22, 17, 20, 3, 0]
    assert golden_eos.our_mask_BR.sum(dim=1).tolist() == [3, 1, 2, 23, 18, 21, 4, 1]


def test_trlx_pays_kl_for_the_padding_behind_eos_we_do_not(golden_pad: Golden) -> None:
    """trlX masks a penalty by the token before its own; in row 0 the columns are x, y, EOS, pad, pad …"""
    assert golden_pad.arrays["rewards"][0, 3] == pytest.approx(-0.0163, abs=1e-4)
    ours_BR = token_rewards(torch.zeros(8), torch.ones(8, 23), golden_pad.our_mask_BR, kl_coef=0.1)
    torch.testing.assert_close(ours_BR[0, :5], torch.tensor([-0.1, -0.1, -0.1, 0.0, 0.0]))


def test_trlx_whitens_padding_too_we_do_not(golden: Golden) -> None:
    hyper, arrays = golden.case["hyper"], golden.arrays
    mask_BR = golden.our_mask_BR
    advantages_BR, _ = gae(arrays["rewards"], arrays["old_values"], mask_BR, gamma=hyper["gamma"], lam=hyper["lam"])
    ours_N = whiten(advantages_BR, mask_BR)[mask_BR]
    assert ours_N.mean().abs() < TOLERANCE
    assert ours_N.var() == pytest.approx(1.0, abs=1e-4)
    assert arrays["advantages_whitened"][mask_BR].mean() > 0.5


def test_trlx_dilutes_approx_kl_with_padding_we_average_counted_tokens(golden: Golden) -> None:
    _, _, stats, _ = recorded_losses(golden, run_actor(golden, load_actor(golden)))
    counted_share = golden.loss_mask_BR.float().mean()
    assert_close(stats["approx_kl"] * counted_share, golden.case["stats"]["policy/approx_kl"])
    assert stats["approx_kl"] > 2 * golden.case["stats"]["policy/approx_kl"]
