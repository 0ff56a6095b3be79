"""Four-bit weights: refused where they cannot be had, trained over, and never published.

bitsandbytes runs on the CPU too, slowly, and so do these tests wherever it is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

from rlhf.adapter_files import save_adapter
from rlhf.adapters import adapter_weights, add_adapters, cast_frozen, merged_weights
from rlhf.config import TinyModelConfig
from rlhf.errors import ConfigError
from rlhf.models import create_tiny_gptj
from rlhf.quantized import check_quantize, quantize_blocks
from tests.fakes import EOS_ID, PAD_ID, tiny_gpt2
from tests.test_adapters import LORA, moved, rows

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes; run `pip install bitsandbytes`"
)
FOUR_BITS = LORA.model_copy(update={"quantize": "4bit"})


def test_four_bits_are_refused_where_they_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    check_quantize(LORA, key="sft", device=cpu, sharded=True)
    with pytest.raises(ConfigError, match=r"^sft.lora.quantize=4bit without adapters.*; set sft.lora.rank$"):
        check_quantize(FOUR_BITS.model_copy(update={"rank": None}), key="sft", device=cuda, sharded=False)
    with pytest.raises(ConfigError, match=r"needs a CUDA GPU, and this runs on cpu; set sft.lora.quantize: none"):
        check_quantize(FOUR_BITS, key="sft", device=cpu, sharded=False)
    with pytest.raises(ConfigError, match=r"does not go with ZeRO-3.*; set sft.deepspeed: zero2"):
        check_quantize(FOUR_BITS, key="sft", device=cuda, sharded=True)
    with pytest.raises(ConfigError, match=r"bitsandbytes, which is not installed; run `pip install bitsandbytes`"):
        check_quantize(FOUR_BITS, key="ppo", device=cuda, sharded=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_quantize(FOUR_BITS, key="ppo", device=cuda, sharded=False)


def test_blocks_without_linear_layers_are_not_quantised() -> None:
    with pytest.raises(ConfigError, match=r"the blocks of GPT2LMHeadModel have no linear layers to quantise"):
        quantize_blocks(tiny_gpt2(), compute_dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(params=["cpu", "cuda"])
def four_bit_device(request: pytest.FixtureRequest) -> torch.device:
    """Where bitsandbytes is; on the CPU it works too, slowly."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; run on a machine that has one")
    return torch.device(request.param)


def wide_policy() -> PreTrainedModel:
    """A group of weights is 64 of a row: on the CPU, bitsandbytes gives wrong ones for narrower rows."""
    shape = TinyModelConfig(layers=2, hidden=64, heads=2, rotary_dim=8, vocab_size=260)
    return create_tiny_gptj(shape, positions=32, vocab_size=260, eos_id=EOS_ID, pad_id=PAD_ID, seed=0)


@needs_bitsandbytes
def test_adapters_train_on_four_bits_and_go_into_the_weights_they_came_from(
    four_bit_device: torch.device, tmp_path: Path
) -> None:
    plain = wide_policy()
    model = quantize_blocks(wide_policy(), compute_dtype=torch.float32, device=four_bit_device)
    blocks_bytes = {name: p.dtype for name, p in model.named_parameters() if name.endswith("proj.weight")}
    assert set(blocks_bytes.values()) == {torch.uint8}
    assert model.get_output_embeddings().weight.dtype == torch.float32
    add_adapters(model, LORA, key="sft", seed=5)
    cast_frozen(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.uint8, torch.bfloat16}
    ids_BT, mask_BT = (tensor.to(four_bit_device) for tensor in rows())
    with torch.autocast(four_bit_device.type, torch.bfloat16):
        model(ids_BT, attention_mask=mask_BT).logits.float().log_softmax(-1)[:, :, 7].sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == adapter_weights(model.state_dict()).keys()
    moved(model)

    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    merged = merged_weights(model, weights, base=plain.state_dict())
    save_adapter(tmp_path, model, weights)
    expected = peft.PeftModel.from_pretrained(wide_policy(), tmp_path).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)
    with pytest.raises(AssertionError, match="give base"):
        merged_weights(model, weights)


@needs_bitsandbytes
def test_four_bits_are_near_the_weights(four_bit_device: torch.device) -> None:
    """NF4's widest gap, from -1 to -0.696 of a group's largest weight, has its middle 0.152 from either end."""
    model = quantize_blocks(wide_policy(), compute_dtype=torch.float32, device=four_bit_device).train()
    layer, weight = model.transformer.h[0].mlp.fc_in, wide_policy().transformer.h[0].mlp.fc_in.weight
    with torch.no_grad():
        eye = torch.eye(weight.shape[1], device=four_bit_device)
        error = ((layer(eye) - layer.bias).T.cpu() - weight).abs() / weight.abs().amax(dim=1, keepdim=True)
    assert 0.05 < error.max() < 0.16
