"""Adapters: they change nothing at first, are all that is trained, and are merged as peft does it."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel

from rlhf.adapter_files import save_adapter
from rlhf.adapters import (
    adapter_weights,
    adapters_off,
    add_adapters,
    cast_frozen,
    has_adapters,
    merged_weights,
)
from rlhf.config import LoraConfig
from rlhf.errors import ConfigError
from rlhf.generation import BuiltinEngine
from rlhf.models import load_policy, position_ids
from rlhf.sampling import Sampling
from tests.fakes import EOS_ID, MODELS, PAD_ID, tiny_gpt2, tiny_policy

TARGETS = {"gptj": ("q_proj", "v_proj"), "llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}
"""GPT-2's `c_proj` is a square layer in its attention and a wide one in its MLP; its weights are transposed."""
LORA = LoraConfig(rank=3, alpha=12.0)

families = pytest.mark.parametrize("family", MODELS)


def adapted(family: str, *, trained: bool = True, top_layers: int | None = None) -> PreTrainedModel:
    """A tiny model with adapters; trained: as if training had moved them."""
    model = MODELS[family]()
    add_adapters(model, lora_for(family), key="sft", seed=5, top_layers=top_layers)
    return moved(model) if trained else model


def lora_for(family: str) -> LoraConfig:
    return LORA.model_copy(update={"targets": TARGETS[family]})


def moved(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device) * 0.1)
    return model


def rows() -> tuple[Tensor, Tensor]:
    """Two rows, the first of them padded on the left."""
    ids_BT = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    return ids_BT.masked_fill(mask_BT == 0, PAD_ID), mask_BT


def logits(model: PreTrainedModel) -> Tensor:
    ids_BT, mask_BT = rows()
    output = model(ids_BT, attention_mask=mask_BT, position_ids=position_ids(mask_BT)).logits
    return output[mask_BT.bool()] if output.dim() == 3 else output


# --- added -------------------------------------------------------------------------------------------


@families
def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(family: str) -> None:
    plain, model = MODELS[family](), adapted(family, trained=False)
    assert torch.equal(logits(model), logits(plain))
    assert type(model) is type(plain)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == set(TARGETS[family])
    assert trained.keys() == adapter_weights(model.state_dict()).keys()
    logits(model).square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained.keys()


def test_a_seed_gives_the_same_adapters_and_leaves_the_global_generator_alone() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = tiny_policy()
        add_adapters(model, LORA, key="sft", seed=seed)
        return adapter_weights(model.state_dict())

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "transformer.h.0.attn.q_proj.lora_A.default.weight"
    assert first[name].shape == (3, 32)
    assert not torch.equal(first[name], other[name])


def test_at_6b_seven_million_weights_are_trained() -> None:
    """By hand: 28 blocks, two layers of 4096 by 4096 each, and rank 16 for either side of both."""
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig())
    add_adapters(model, LoraConfig(rank=16), key="sft", seed=1)
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    assert counts == {True: 7_340_032, False: 6_050_882_784}


@families
def test_only_the_top_blocks_get_adapters(family: str) -> None:
    names = adapter_weights(adapted(family, top_layers=1).state_dict())
    assert names
    assert all(".1." in name and ".0." not in name for name in names)


def test_what_is_trained_is_float32_and_the_frozen_rest_may_be_narrower() -> None:
    model = tiny_policy().to(torch.bfloat16)
    add_adapters(model, LORA, key="sft", seed=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model = adapted("llama")
    before = logits(model)
    cast_frozen(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model) - before).abs().max() < 0.05 * before.abs().max()


def test_a_target_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError) as caught:
        add_adapters(tiny_gpt2(), LORA, key="reward", seed=1)
    assert str(caught.value) == (
        "reward.lora.targets=[q_proj, v_proj]: the blocks of GPT2LMHeadModel have no linear layer q_proj; "
        "they have c_attn, c_fc, c_proj"
    )
    for target in ("lm_head", "proj", "ln_1"):  # outside the blocks, half a name, no linear layer
        with pytest.raises(ConfigError, match=rf"targets=\[{target}\]: the blocks of GPTJForCausalLM have no linear"):
            add_adapters(tiny_policy(), LORA.model_copy(update={"targets": (target,)}), key="sft", seed=1)
    with pytest.raises(ConfigError, match=r"sft.lora.targets is empty"):
        add_adapters(tiny_policy(), LORA.model_copy(update={"targets": ()}), key="sft", seed=1)


@families
def test_gradient_checkpointing_and_padding_change_no_gradient(family: str) -> None:
    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        model.train()
        logits(model).log_softmax(-1)[:, 7].sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = adapted(family), adapted(family)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(plain)
    assert expected
    torch.testing.assert_close(gradients(checkpointed), expected)
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in expected.values())


# --- off ---------------------------------------------------------------------------------------------


@families
def test_off_they_are_not_there_and_then_they_are_back(family: str) -> None:
    model, plain = adapted(family), logits(MODELS[family]())
    on = logits(model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert (on - plain).abs().max() > 1e-2
    with pytest.raises(KeyError, match="in between"), adapters_off(model):
        assert torch.equal(logits(model), plain)
        with adapters_off(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
        raise KeyError("in between")
    assert torch.equal(logits(model), on)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_only_those_below_the_module_are_off() -> None:
    model = adapted("gptj")
    with adapters_off(model.transformer.h[1]):
        half = logits(model)
    with adapters_off(model):
        none = logits(model)
    assert not torch.equal(half, none)
    assert not torch.equal(half, logits(model))


@families
def test_generation_sees_them(family: str) -> None:
    def greedy(model: PreTrainedModel) -> list[list[int]]:
        engine = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID)
        prompts = [list(range(10, 30)), [7, 8, 9]]
        return engine.generate(prompts, Sampling(max_new_tokens=8, temperature=0.0)).response_BR.tolist()

    model, merged = adapted(family), MODELS[family]()
    merged.load_state_dict(merged_weights(model, model.state_dict()))
    assert greedy(model) == greedy(merged)
    with adapters_off(model):
        assert greedy(model) == greedy(MODELS[family]())
    assert greedy(merged) != greedy(MODELS[family]())


# --- merged ------------------------------------------------------------------------------------------


@families
def test_merged_weights_are_those_of_peft(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_weights(model, weights)
    save_adapter(tmp_path, model, weights)
    expected = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)  # nothing was changed in place


@families
def test_what_is_published_is_a_plain_model(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    model.save_pretrained(tmp_path, state_dict=merged_weights(model, model.state_dict()))
    published = load_policy(tmp_path)
    assert not has_adapters(published)
    torch.testing.assert_close(logits(published), logits(model), atol=1e-4, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if "adapter" in path.name) == []


def test_a_model_without_adapters_passes_through() -> None:
    model = tiny_gpt2()
    weights = model.state_dict()
    merged = merged_weights(model, weights)
    assert merged.keys() == weights.keys()
    assert all(merged[name] is weights[name] for name in weights)
    assert adapter_weights(weights) == {}


def test_narrow_weights_are_merged_into_those_they_came_from() -> None:
    plain, model = tiny_policy(), adapted("gptj")
    expected = merged_weights(model, dict(model.state_dict()))
    cast_frozen(model, torch.bfloat16)
    merged = merged_weights(model, model.state_dict(), base=plain.state_dict())
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    rounded = merged_weights(model, model.state_dict())["transformer.h.0.attn.q_proj.weight"]
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, expected["transformer.h.0.attn.q_proj.weight"])
