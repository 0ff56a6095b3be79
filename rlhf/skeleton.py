"""A model without its weights, built from config.json only as far as the files beside it make its size believable.

Nothing here takes memory for a weight: torch's `meta` device gives shapes alone.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import PrerequisiteError
from rlhf.quoting import one_line, shown
from rlhf.weights import REMEDY, StoredTensor

MAX_LABELS = 100_000
TIMES_STORED = 2
"""A model may have twice the numbers of its files: a tied head is registered twice, and stored once."""
BESIDE_STORED = 2**26
"""What no file holds, as a fresh score head and tables of positions: 256 MiB in float32."""
MODULES_EACH, MODULES_BESIDE = 16, 1024
"""Modules that a stored tensor makes believable, dropouts and activations included, and those that any model has."""

_LAYER_COUNT = re.compile(r"(?:(?:n|num|encoder|decoder)_(?:\w+_)?(?:layers?|blocks?))")


class _TooLarge(Exception):
    """The model that is being built outgrows its files; says how."""


def check_counts(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse a config.json whose numbers of layers or labels nobody stored, before transformers makes lists of them.

    Raises PrerequisiteError naming the key.
    """
    for key, value in _entries(settings):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if _LAYER_COUNT.fullmatch(key) and value > len(stored):
            raise PrerequisiteError(
                f"{path}: {key}={shown(value)}, and the files beside it hold {len(stored)} tensors; {REMEDY}"
            )
        if key == "num_labels" and value > MAX_LABELS:
            raise PrerequisiteError(f"{path}: {key}={shown(value)} is more than {MAX_LABELS}; {REMEDY}")


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            yield from node.items()
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def build_skeleton(
    auto_class: Any, config: PretrainedConfig, stored: Mapping[str, StoredTensor], path: Path
) -> PreTrainedModel:
    """The model of a config on the `meta` device, held against the tensors that are stored for it.

    Raises PrerequisiteError where it would be far larger than they are, where one has another shape, and where
    transformers has no such model of this kind.
    """
    # Not by `from_config`, which would begin to share weights out under DeepSpeed's ZeRO-3.
    kinds = auto_class._model_mapping.get(type(config), None)
    if kinds is None:
        raise PrerequisiteError(f"{path} is of a {config.model_type!r}, which is no model for {auto_class.__name__}")
    kind = kinds[0] if isinstance(kinds, (list, tuple)) else kinds
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the others have the same weights, and can ask for what is not installed
    try:
        with torch.device("meta"), _as_large_as(stored):
            model = kind(config)
    except _TooLarge as error:
        raise PrerequisiteError(f"{path} describes {error}; {REMEDY}") from None
    except Exception as error:  # what a number that makes no sense raises, each architecture decides
        reason = one_line(str(error))[:200] or type(error).__name__
        raise PrerequisiteError(f"{path} describes no model that can be built: {reason}; {REMEDY}") from error
    _check_shapes(model, stored, path)
    return model


def _check_shapes(model: PreTrainedModel, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse what takes another size; transformers itself turns some tensors round, and reports the others."""
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].numbers != parameter.numel():
            raise PrerequisiteError(
                f"{path.parent}: {name} is {stored[name].shape} in the file, {tuple(parameter.shape)} in {path.name}"
            )


@contextmanager
def _as_large_as(stored: Mapping[str, StoredTensor]) -> Iterator[None]:
    """Stop this thread's building of a model, with _TooLarge, once it outgrows what is stored."""
    thread = threading.get_ident()
    numbers = sum(tensor.numbers for tensor in stored.values())
    most_numbers = TIMES_STORED * numbers + BESIDE_STORED
    most_modules = MODULES_EACH * len(stored) + MODULES_BESIDE
    modules = made = 0

    def count_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > most_modules:
                raise _TooLarge(f"more than {most_modules} modules, and {len(stored)} tensors are stored")

    def count_tensor(parent: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal made
        if threading.get_ident() == thread and tensor is not None:
            made += tensor.numel()
            if made > most_numbers:
                raise _TooLarge(f"a model of {made} numbers or more, and {numbers} are stored")

    handles = (
        torch_module.register_module_module_registration_hook(count_module),
        torch_module.register_module_parameter_registration_hook(count_tensor),
        torch_module.register_module_buffer_registration_hook(count_tensor),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
