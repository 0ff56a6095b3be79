"""Low-rank adapters (LoRA): put into a model in place, switched off, and merged into its weights.

A linear layer W with an adapter computes W x + (alpha / rank) B A x; only A and B are trained, and B begins at zero.
The model keeps its class; peft puts a layer of its own around each one that is adapted, so that a weight's name
`….q_proj.weight` becomes `….q_proj.base_layer.weight`, with `….q_proj.lora_A.default.weight` and lora_B beside it.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config import LoraConfig
from rlhf.errors import ConfigError
from rlhf.model_files import first_line
from rlhf.models import backbone, blocks

ADAPTER = "default"
"""peft's name for the only adapter of a model; it stands in the names of its weights."""


def add_adapters(
    model: PreTrainedModel,
    lora: LoraConfig,
    *,
    key: str,
    seed: int,
    top_layers: int | None = None,
    also_train: Sequence[str] = (),
) -> None:
    """Put adapters into the linear layers of the blocks that `lora.targets` names, and freeze everything else.

    top_layers: only the top so many blocks get any. also_train: modules that are trained in full beside them, such as
    a fresh score head. What is trained is float32. The model computes what it did before, and a seed gives the same
    adapters on every device; the global random generator stays where it was.
    Raises ConfigError naming `<key>.lora.targets` where the blocks have no such layer or peft cannot adapt it.
    """
    assert not has_adapters(model), "the model has adapters already"
    adapted = _target_layers(model, lora, key=key, top_layers=top_layers)
    settings = _peft_settings(model, lora, adapted, top_layers=top_layers)
    with torch.random.fork_rng(devices=[]):  # peft draws A on the CPU
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"{key}.lora.targets={_listed(lora.targets)}: peft cannot adapt {type(model).__name__}: "
                f"{first_line(error)}; leave {key}.lora.rank empty or choose another model.base"
            ) from error
    for name in also_train:
        model.get_submodule(name).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights that are not trained in this precision; quantised ones and buffers stay as they are.

    Train under autocast then, where dtype is not float32, and merge into the weights as they were before.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of the model is adapted."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Let the layers at and below a module compute what they would without adapters, for the while.

    What is trained stays so: peft's own switch also takes `requires_grad` away from the adapters and gives it to all
    of them afterwards, behind the back of whatever has wrapped the model for training.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def merged_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor], *, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The plain model's weights with its adapters in them: W + (alpha / rank) B A, computed and kept in float32.

    weights: whole tensors by the names of `model.state_dict()`, wherever they were gathered; the model only says
    which layers are adapted, so that its own weights may be sharded or on the move. base: the plain weights that the
    adapters are merged into, where the model's own are quantised or in half precision; those of the source directory.
    Neither is changed; weights without an adapter are passed on, not copied. Equal to peft's `merge_and_unload`.
    """
    if base is None:
        assert not getattr(model, "is_loaded_in_4bit", False), "quantised weights cannot be merged into; give base"
        merged = {_plain(name): tensor for name, tensor in weights.items() if not _is_adapter(name)}
    else:
        merged = {**base, **fully_trained_weights(model, weights)}
    for name, layer in _adapted_layers(model):
        down, up = (weights[f"{name}.{part}.{ADAPTER}.weight"].float() for part in ("lora_A", "lora_B"))
        change = (up @ down) * layer.scaling[ADAPTER]
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + (change.T if layer.fan_in_fan_out else change)
    return merged


def adapter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the adapters alone, from weights by the names of `model.state_dict()`."""
    return {name: tensor for name, tensor in weights.items() if _is_adapter(name)}


def fully_trained_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the modules that are trained in full beside the adapters, from weights by the same names."""
    modules = fully_trained_modules(model)
    return {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] in modules}


def fully_trained_modules(model: PreTrainedModel) -> set[str]:
    """The names of the modules with weights of their own that are trained and no adapter's."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.rpartition(".")[0] for name in trained if not _is_adapter(name)}


def _target_layers(
    model: PreTrainedModel, lora: LoraConfig, *, key: str, top_layers: int | None
) -> dict[str, nn.Module]:
    """The linear layers to adapt, by their names within the blocks; each target must name at least one."""
    try:
        layers = blocks(backbone(model))
    except ValueError as error:
        raise ConfigError(f"{key}.lora.rank={lora.rank}: {error}") from error
    chosen = layers if top_layers is None else layers[len(layers) - top_layers :]
    linear = {name: module for name, module in chosen.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for target in lora.targets:
        if not any(_is_named(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"{key}.lora.targets={_listed(lora.targets)}: the blocks of {type(model).__name__} have no linear "
                f"layer {target}; they have {', '.join(known) or 'none'}"
            )
    if not lora.targets:
        raise ConfigError(f"{key}.lora.targets is empty; name linear layers, or leave {key}.lora.rank empty")
    return {name: module for name, module in linear.items() if any(_is_named(name, t) for t in lora.targets)}


def _peft_settings(
    model: PreTrainedModel, lora: LoraConfig, adapted: Mapping[str, nn.Module], *, top_layers: int | None
) -> peft.LoraConfig:
    assert lora.rank is not None, "no rank: adapters are off"
    body = backbone(model)
    count = len(blocks(body))
    names = [name for name, child in body.named_children() if child is blocks(body)]
    classifier = model.get_output_embeddings() is None
    return peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        # Always given: a layer of that name outside the blocks is not meant.
        layers_to_transform=list(range(count - (top_layers or count), count)),
        layers_pattern=names[0],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in adapted.values()),
    )


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _listed(targets: Sequence[str]) -> str:
    return f"[{', '.join(targets)}]"
