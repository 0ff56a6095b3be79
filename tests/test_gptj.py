"""Our passes through GPT-J give what transformers' own give: padded, cached, packed, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

from rlhf.config import TinyModelConfig
from rlhf.forward import hidden_states, token_logits
from rlhf.gptj import FusedAttention, is_gptj, use_fused_attention
from rlhf.models import backbone, create_tiny_gptj, load_policy, load_reward_model, reward_model_from_policy
from rlhf.packing import Packed, pack, pack_groups
from tests.test_models import tiny_llama

VOCABULARY = 50
SHAPES = {
    "demo": {"n_embd": 32, "n_head": 4, "rotary_dim": 4, "initializer_range": 0.3},
    "head of 256": {"n_embd": 512, "n_head": 2, "rotary_dim": 64, "initializer_range": 0.05},
    "all turned": {"n_embd": 32, "n_head": 4, "rotary_dim": 8, "initializer_range": 0.3},
}
SEQUENCES = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17]]
ENDINGS = [[[20, 21, 22], [23]], [[24, 25]], [[26], [27, 28], [29, 30, 31, 32]]]


def original(shape: str = "demo") -> GPTJForCausalLM:
    torch.manual_seed(3)
    config = GPTJConfig(vocab_size=VOCABULARY, n_positions=64, n_layer=3, **SHAPES[shape])
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPTJForCausalLM(config).eval()


def fused(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    use_fused_attention(copied)
    return copied


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_and_gradients_equal_the_originals(shape: str, side: str) -> None:
    plain, fast = original(shape), fused(original(shape))
    ids_BT = torch.arange(3, 23).view(2, 10)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, : 3 if side == "left" else 10] = 0
    mask_BT[1, 5:6] = 1
    if side == "right":
        mask_BT[1, :6] = 1
    counted = mask_BT.bool()
    expected, found = (model(ids_BT, attention_mask=mask_BT).logits[counted] for model in (plain, fast))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.detach().abs().max()), rtol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(fast.get_parameter(name).grad, parameter.grad, atol=1e-5 * scale, rtol=1e-5)


def test_generation_with_transformers_cache_equals_the_originals() -> None:
    plain, fast = original(), fused(original())
    ids_BT = torch.tensor([[1, 1, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected, found = (
        model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=12, do_sample=False, pad_token_id=1)
        for model in (plain, fast)
    )
    assert torch.equal(found, expected)


def test_in_bfloat16_the_difference_is_rounding() -> None:
    ids_BT = torch.arange(3, 23).view(2, 10)
    exact = original()(ids_BT).logits.detach()
    errors = []
    for model in (original(), fused(original())):
        logits = model.to(torch.bfloat16)(ids_BT).logits.detach().float()
        errors.append(float((logits - exact).abs().max() / exact.abs().max()))
    assert errors[1] < max(1.5 * errors[0], 0.02)


def test_weights_and_their_names_stay(tmp_path: Path) -> None:
    plain = original()
    fast = fused(plain)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    fast.save_pretrained(tmp_path)
    again = GPTJForCausalLM.from_pretrained(tmp_path)
    assert type(again.transformer.h[0].attn) is GPTJAttention
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_every_way_to_a_model_gives_it(tmp_path: Path) -> None:
    shape = TinyModelConfig(layers=2, hidden=16, heads=2, rotary_dim=4)
    made = create_tiny_gptj(shape, positions=16, vocab_size=VOCABULARY, eos_id=0, pad_id=1, seed=1)
    made.save_pretrained(tmp_path / "policy")
    reward = reward_model_from_policy(tmp_path / "policy", seed=1)
    reward.save_pretrained(tmp_path / "reward")
    loaded = [made, load_policy(tmp_path / "policy"), reward, load_reward_model(tmp_path / "reward")]
    for model in loaded:
        assert is_gptj(model.base_model)
        assert all(type(block.attn) is FusedAttention for block in model.base_model.h)


def test_other_activations_and_architectures_are_left_alone() -> None:
    config = GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2, rotary_dim=4, activation_function="relu")
    model = GPTJForCausalLM(config)
    before = model.transformer.h[0].mlp.act
    use_fused_attention(model)
    assert model.transformer.h[0].mlp.act is before
    llama = tiny_llama()
    kinds = [type(module) for module in llama.modules()]
    use_fused_attention(llama)
    assert [type(module) for module in llama.modules()] == kinds
    assert not is_gptj(llama.base_model)


# --- packed --------------------------------------------------------------------------------------------


def families() -> list[tuple[PreTrainedModel, PreTrainedModel]]:
    """A model and the one that runs packed, of the same weights."""
    gptj, llama = original(), tiny_llama()
    return [(gptj, fused(gptj)), (llama, copy.deepcopy(llama))]


def alone(model: PreTrainedModel, sequences: Sequence[Sequence[int]], keep: Sequence[int]) -> Tensor:
    """Final hidden states of the last tokens of each sequence, one after another."""
    body = backbone(model)
    states = [body(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0] for ids in sequences]
    return torch.cat([state[len(state) - count :] for state, count in zip(states, keep, strict=True)])


def ungrouped() -> list[list[int]]:
    return [[*ids, *ending] for ids, endings in zip(SEQUENCES, ENDINGS, strict=True) for ending in endings]


KEPT = [[1, 1, 1, 1, 1, 1], [3, 1, 2, 0, 2, 4]]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("keep", KEPT)
def test_groups_give_what_each_sequence_gives_alone_with_gradients(number: int, keep: list[int]) -> None:
    plain, fast = families()[number]
    packed = pack_groups(SEQUENCES, ENDINGS, keep=keep)
    expected, found = alone(plain, ungrouped(), keep), hidden_states(backbone(fast), packed)
    check_equal_with_gradients(plain, fast, expected, found)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("keep", [[1, 1, 1], [7, 0, 2], None])
def test_sequences_give_what_each_gives_alone_with_gradients(number: int, keep: list[int] | None) -> None:
    plain, fast = families()[number]
    found = hidden_states(backbone(fast), pack(SEQUENCES, keep=keep))
    expected = alone(plain, SEQUENCES, [len(ids) for ids in SEQUENCES] if keep is None else keep)
    check_equal_with_gradients(plain, fast, expected, found)


def check_equal_with_gradients(plain: PreTrainedModel, fast: PreTrainedModel, expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            continue  # the LM head
        scale = max(float(parameter.grad.abs().max()), 1e-3)
        torch.testing.assert_close(fast.get_parameter(name).grad, parameter.grad, atol=2e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_shared_tokens_have_the_state_of_the_first_sequence(number: int) -> None:
    plain, fast = families()[number]
    packed = pack_groups(SEQUENCES[:1], ENDINGS[:1], keep=None)
    expected = torch.cat([alone(plain, [ungrouped()[0]], [10]), alone(plain, [ungrouped()[1]], [1])])
    torch.testing.assert_close(hidden_states(backbone(fast), packed), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_logits_of_kept_tokens_equal_the_plain_ones(number: int) -> None:
    plain, fast = families()[number]
    keep = [2, 3, 1]
    expected = [plain(torch.tensor([ids])).logits[0, -n:] for ids, n in zip(SEQUENCES, keep, strict=True)]
    torch.testing.assert_close(
        token_logits(fast, pack(SEQUENCES, keep=keep)), torch.cat(expected), atol=1e-5, rtol=1e-5
    )


def test_inputs_stand_in_for_the_embeddings() -> None:
    model = fused(original())
    packed = pack(SEQUENCES, keep=2)
    inputs_NH = model.transformer.wte(packed.ids_N)
    found = hidden_states(model.transformer, packed, inputs_NH=inputs_NH)
    assert torch.equal(found, hidden_states(model.transformer, packed))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(prepare: Callable[[PreTrainedModel], object]) -> list[Tensor]:
        model = fused(original())
        prepare(model)
        model.train()
        ran = []
        model.transformer.h[1].mlp.fc_in.register_forward_pre_hook(lambda *_: ran.append(1))
        hidden_states(model.transformer, pack(SEQUENCES, keep=2)).square().sum().backward()
        passes.append(len(ran))
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    passes: list[int] = []
    expected = gradients(lambda _: None)
    found = gradients(lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}))
    assert passes == [1, 2]
    torch.testing.assert_close(found, expected)


def test_the_last_block_computes_kept_tokens_only() -> None:
    model = fused(original())
    seen: dict[int, int] = {}

    def note(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.__setitem__(number, len(inputs[0]))

    for number, block in enumerate(model.transformer.h):
        block.mlp.fc_in.register_forward_pre_hook(note(number))
    packed: Packed = pack(SEQUENCES, keep=1)
    hidden_states(model.transformer, packed)
    assert seen == {0: 15, 1: 15, 2: 3}
