"""QLoRA: the frozen weights of the blocks in four bits, under adapters in full precision.

Embeddings, norms and heads stay as they are. What is quantised is never trained and never published: adapters are
merged into the weights of the directory that the model came from.
Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.config import LoraConfig
from rlhf.errors import ConfigError
from rlhf.models import backbone, blocks


def check_quantize(lora: LoraConfig, *, key: str, device: torch.device, sharded: bool) -> None:
    """Raise ConfigError, with the remedy, where `<key>.lora.quantize` cannot be had; do it before loading a model.

    sharded: whether the weights are spread over processes, as by ZeRO-3, which cannot take quantised ones apart.
    """
    if lora.quantize == "none":
        return
    setting = f"{key}.lora.quantize={lora.quantize}"
    if lora.rank is None:
        raise ConfigError(f"{setting} without adapters, and quantised weights cannot be trained; set {key}.lora.rank")
    if sharded:
        raise ConfigError(f"{setting} does not go with ZeRO-3, which shards the weights; set {key}.deepspeed: zero2")
    if device.type != "cuda":
        raise ConfigError(f"{setting} needs a CUDA GPU, and this runs on {device.type}; set {key}.lora.quantize: none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{setting} needs bitsandbytes, which is not installed; run `pip install bitsandbytes`, or set "
            f"{key}.lora.quantize: none"
        )


def quantize_blocks(model: PreTrainedModel, *, compute_dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Replace the linear layers of the blocks by 4-bit ones on the device, one at a time; gives the model there.

    NF4, in groups of 64 whose scales are quantised too: about 4.13 bits a weight. Products are computed in
    compute_dtype. Load the model on the CPU before, and add adapters after.
    Raises ConfigError for blocks without linear layers, such as GPT-2's, which multiplies by transposed weights.
    """
    quantised = 0
    for block in blocks(backbone(model)):
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, _four_bit(module, compute_dtype, device))
                quantised += 1
    if not quantised:
        raise ConfigError(
            f"lora.quantize=4bit: the blocks of {type(model).__name__} have no linear layers to quantise; "
            "set lora.quantize: none or choose another model.base"
        )
    model.is_loaded_in_4bit = True  # by this peft knows that its layers for 4 bits are wanted
    return model.to(device)


def _four_bit(linear: nn.Linear, compute_dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same layer with its weight quantised, which moving it to its device does."""
    import bitsandbytes  # optional, and slow to import

    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().to(compute_dtype),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    )
    made.bias = linear.bias
    return made.to(device)
