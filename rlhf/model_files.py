"""A model directory opened without trust: only safetensors, and judged by its small files before memory is taken.

config.json and the weights' headers are held against each other first; no code from a model directory runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf.errors import PrerequisiteError
from rlhf.quoting import one_line, shown
from rlhf.skeleton import build_skeleton, check_counts
from rlhf.weight_reading import read_weights
from rlhf.weights import REMEDY, StoredTensor, parse_object, stored_tensors

CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**24
_ELSEWHERE = {
    "quantization_config": "its weights are quantised, which cannot be trained; give it in bfloat16 or wider",
    "transformers_weights": "it names other weights than those in its directory; remove the key",
}
WRONG_CONTENT = (
    OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
"""What transformers raises for files that it cannot take. A RuntimeError is rather the machine's: memory is short."""
_DIGESTS = "_file_digests"
_ATTENTIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def open_config(directory: Path) -> tuple[PretrainedConfig, dict[str, StoredTensor]]:
    """A model directory's config as it was saved, and the tensors that its files hold.

    Raises PrerequisiteError where either cannot be read, and for what would make transformers load anything else
    than the weights here: quantised ones, adapters, kernels from the Hub.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise PrerequisiteError(f"{directory} holds no model: {CONFIG} is missing; run the stage that makes it")
    settings = _read_settings(path)
    stored = stored_tensors(directory)
    _refuse_elsewhere(directory, settings)
    check_counts(settings, stored, path)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # what a wrong value raises, each architecture decides
        raise PrerequisiteError(f"{path} is not one of transformers': {first_line(error)}") from error
    return config, stored


def load_model(
    auto_class: Any,
    directory: Path,
    config: PretrainedConfig,
    stored: dict[str, StoredTensor],
    dtype: torch.dtype | str,
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the weights that its files lack (transformers makes those up) and the unused ones.

    Its weights are this process's own memory; `file_digests` tells what they were read from.
    Raises PrerequisiteError where files and config do not go together.
    """
    skeleton = build_skeleton(auto_class, config, stored, directory / CONFIG)
    read = read_weights(directory, stored, dtype=_reading_dtype(skeleton, dtype))
    attention = {"attn_implementation": "eager"} if config.model_type == "gptj" else {}
    try:
        with quiet_transformers():
            model, report = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=read.tensors,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **attention,
            )
            _name(model, directory)
    except WRONG_CONTENT as error:
        raise PrerequisiteError(f"{directory} cannot be loaded as a model: {first_line(error)}") from error
    if report["mismatched_keys"]:
        name, there, wanted = sorted(report["mismatched_keys"])[0]
        raise PrerequisiteError(f"{directory}: {name} is {tuple(there)} in the file, {tuple(wanted)} in {CONFIG}")
    setattr(model, _DIGESTS, read.digests)
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def file_digests(model: PreTrainedModel) -> Mapping[str, str]:
    """The sha256 in hex of each weight file as `load_model` read it, by its name in the model's directory."""
    digests: Mapping[str, str] = getattr(model, _DIGESTS)
    return digests


def _reading_dtype(skeleton: PreTrainedModel, dtype: torch.dtype | str) -> torch.dtype | None:
    """What weights are turned into while they are read; None where transformers has to choose for each of them."""
    some_stay_wide = skeleton._keep_in_fp32_modules or skeleton._keep_in_fp32_modules_strict
    return dtype if isinstance(dtype, torch.dtype) and not some_stay_wide else None


def _name(model: PreTrainedModel, directory: Path) -> None:
    """Tell a model what `from_pretrained` tells one whose directory it reads by itself: its name, how it generates."""
    model.name_or_path = model.config.name_or_path = str(directory)
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory, trust_remote_code=False)
    except OSError:  # older models have these settings in config.json
        model.generation_config = GenerationConfig.from_pretrained(
            directory, CONFIG, trust_remote_code=False, _from_model_config=True
        )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"longer than {MAX_CONFIG_BYTES} bytes")
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path} is not one of transformers': {error}; {REMEDY}") from error


def _refuse_elsewhere(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse what would bring weights or code from elsewhere."""
    if (directory / "adapter_config.json").exists():
        raise PrerequisiteError(
            f"{directory} holds an adapter, whose config can name weights elsewhere; merge it into its model, "
            "save that, and remove adapter_config.json"
        )
    for key, problem in _ELSEWHERE.items():
        if settings.get(key) is not None:
            raise PrerequisiteError(f"{directory / CONFIG}: {key} is set: {problem}")
    for key in _ATTENTIONS:
        if "/" in str(settings.get(key)):
            raise PrerequisiteError(
                f"{directory / CONFIG}: {key}={shown(settings[key])} is code from the Hub; remove it"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back its report on absent weights, which we check ourselves, and its progress bar."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its name where it says nothing."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])
