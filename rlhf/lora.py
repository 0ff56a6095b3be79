"""LoRA in a stage: adapters put in before training, and merged into what is published, with the adapters beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.adapter_files import load_adapter, save_adapter
from rlhf.adapters import add_adapters, cast_frozen, has_adapters, merged_weights
from rlhf.config import LoraConfig
from rlhf.quantized import quantize_blocks

ADAPTER_DIR = "adapter"
"""Where a published model's directory keeps its adapters, in peft's format."""


def adapt(
    model: PreTrainedModel,
    lora: LoraConfig,
    *,
    key: str,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    start: Path | None,
    top_layers: int | None = None,
    also_train: Sequence[str] = (),
) -> PreTrainedModel:
    """The model that the adapters start from, on the CPU, made ready for training, or to go on from checkpoint `start`.

    Its frozen weights lie in `dtype`, or in four bits; see `adapters.add_adapters` for the rest.
    """
    model = quantized(model, lora, dtype=dtype, device=device)
    add_adapters(model, lora, key=key, seed=seed, top_layers=top_layers, also_train=also_train)
    cast_frozen(model, dtype)
    if start is not None:
        load_adapter(model, start / ADAPTER_DIR)
    return model


def quantized(model: PreTrainedModel, lora: LoraConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model as it is, or on the device with its blocks in four bits, as the settings say."""
    if lora.quantize == "none":
        return model
    return quantize_blocks(model, compute_dtype=dtype, device=device)


def write_model(
    directory: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], *, source: Callable[[], PreTrainedModel]
) -> None:
    """A directory that transformers loads: the model with these weights, whole and in host memory, by its own names.

    With adapters it holds them merged into the model that `source` loads, which is what they started from in full
    precision, and beside it the adapters alone.
    """
    if has_adapters(model):
        save_adapter(directory / ADAPTER_DIR, model, weights)
        exact = all(weight.dtype == torch.float32 for weight in weights.values())
        weights = merged_weights(model, weights, base=None if exact else source().state_dict())
    model.save_pretrained(directory, state_dict=dict(weights))
