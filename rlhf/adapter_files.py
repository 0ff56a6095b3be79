"""An adapter on disk, in peft's own format: `adapter_model.safetensors` and `adapter_config.json`, nothing pickled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.adapters import ADAPTER, adapter_weights, fully_trained_modules, fully_trained_weights
from rlhf.errors import PrerequisiteError
from rlhf.quoting import shown
from rlhf.weights import parse_object, read_header

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIX = "base_model.model."
_REMEDY = "run the stage again in a new run"


def save_adapter(directory: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Write the adapters, and the modules trained in full, as peft does: `peft.PeftModel.from_pretrained` reads them.

    weights: as in `rlhf.adapters.merged_weights`. The model that the adapters belong to is not named: it has been
    read from another stage's directory, which can move.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in _saved_part(model, weights).items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings = copy.copy(model.peft_config[ADAPTER])
    settings.target_modules = sorted(settings.target_modules)  # peft keeps a set, whose order changes from run to run
    settings.modules_to_save = sorted(fully_trained_modules(model)) or None
    settings.save_pretrained(directory)


def load_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Put what `save_adapter` wrote back into a model with the same adapters, bit by bit; do it before it is wrapped.

    Raises PrerequisiteError, in one line that names the directory, for files that are damaged or another model's.
    """
    _check_settings(model, directory)
    path = directory / ADAPTER_WEIGHTS
    there = {name: tensor.shape for name, tensor in read_header(path).items()}
    places = _saved_part(model, dict(model.named_parameters()))
    if unknown := there.keys() ^ places.keys():
        name = min(unknown)
        problem = "is missing" if name in places else "is in no layer of this model"
        raise PrerequisiteError(f"{directory} holds another model's adapters: {shown(name)} {problem}; {_REMEDY}")
    for name, parameter in places.items():
        if there[name] != tuple(parameter.shape):
            raise PrerequisiteError(
                f"{directory} holds another model's adapters: {shown(name)} is {there[name]} in the file, "
                f"{tuple(parameter.shape)} in the model; {_REMEDY}"
            )
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(tensors[name])


def _check_settings(model: PreTrainedModel, directory: Path) -> None:
    """Hold an adapter's configuration against the model's own; alpha is nowhere else."""
    path = directory / ADAPTER_CONFIG
    try:
        settings = parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path} is no adapter's configuration: {error}; {_REMEDY}") from error
    own = model.peft_config[ADAPTER]
    wanted: dict[str, Any] = {"peft_type": "LORA", "r": own.r, "lora_alpha": own.lora_alpha}
    for name, value in wanted.items():
        if settings.get(name) != value:
            raise PrerequisiteError(
                f"{path} has {name}={shown(settings.get(name))} where this run's configuration gives {value}; {_REMEDY}"
            )


def _saved_part(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters and what is trained in full beside them, by the names that peft gives them on disk."""
    part = adapter_weights(weights) | fully_trained_weights(model, weights)
    return {_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in part.items()}
