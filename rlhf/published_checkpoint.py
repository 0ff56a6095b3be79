"""A GPT-J as trlX's summarize example publishes it: its tensors under the names of the present transformers.

A policy is a causal LM (`transformer.*`, `lm_head.*`); trlX's own export puts `base_model.` before that, and adds
the value head `v_head.*` and the reference's `frozen_head.*`. A reward model is `transformer.*` and `v_head.weight`.
Source: trlX at 3340c2f, trlx/models/modeling_ppo.py:354 and :455 (`state_dict`), and
examples/summarize_rlhf/reward_model/reward_model.py (`GPTRewardModel`).

Nothing is trusted: pickles are read by torch's reader of weights alone, safetensors after their headers, and names
and shapes are held against the model of the config before memory is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTJConfig

from rlhf.errors import PrerequisiteError
from rlhf.model_files import CONFIG, MAX_CONFIG_BYTES, first_line
from rlhf.models import REWARD_HEAD
from rlhf.pickled import ALLOWED, is_old_buffer, read_pickle
from rlhf.quoting import shown
from rlhf.skeleton import build_skeleton, check_counts
from rlhf.weights import (
    INDEX,
    MAX_INDEX_BYTES,
    PICKLES,
    StoredTensor,
    parse_index,
    parse_object,
    read_header,
    weight_files,
)

logger = logging.getLogger(__name__)

Kind = Literal["policy", "reward"]
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TRLX_PREFIX, TRLX_HEADS, TRLX_REWARD_HEAD = "base_model.", ("v_head.", "frozen_head."), "v_head.weight"
DTYPE_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
AUTO_CLASSES = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}

SHAPE_KEYS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner", "activation_function",
    "layer_norm_epsilon",
)  # fmt: skip
"""All that is taken out of a stranger's config.json."""
SIX_BILLION = {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_positions": 2048}
"""GPT-J-6B's, of which weights tell the first alone. Source: EleutherAI/gpt-j-6b, config.json."""
LISTED = 5
_AGAIN = "download the model again"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or a directory by name, mapped from the files, without old buffers.

    Raises PrerequisiteError where there are none, where one is missing, and for what is no weight.
    """
    if path.is_file():
        files = [path]
    elif any((path / name).is_file() for name in ("model.safetensors", INDEX)):
        files = weight_files(path)
    else:
        files = _pickled_files(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
        if twice := found.keys() & tensors.keys():
            raise PrerequisiteError(f"{file} holds {shown(min(twice))}, which another shard holds too; {_AGAIN}")
        tensors |= found
    if not tensors:
        raise PrerequisiteError(f"{path} holds no weights; {_AGAIN}")
    return tensors


def named_weights(kind: Kind, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under transformers' names, without those that the model itself has no use for.

    Raises PrerequisiteError for a model of the other kind.
    """
    weights = {name.removeprefix(TRLX_PREFIX): tensor for name, tensor in tensors.items()}
    if len(weights) < len(tensors):
        raise PrerequisiteError(f"{path} holds tensors both with and without {TRLX_PREFIX!r}; {_AGAIN}")
    is_language_model = any(name.startswith("lm_head.") for name in weights)
    if kind == "policy":
        if not is_language_model and weights.keys() & {TRLX_REWARD_HEAD, REWARD_HEAD}:
            raise PrerequisiteError(f"{path} is a reward model, it has no lm_head; give --kind reward")
        beside = [name for name in weights if name.startswith(TRLX_HEADS)]
        if beside:
            logger.info("left out tensors=%d: trlX's value head and frozen reference", len(beside))
        return {name: weight for name, weight in weights.items() if name not in beside}
    if TRLX_REWARD_HEAD not in weights:
        if is_language_model:
            raise PrerequisiteError(f"{path} is a language model, it has lm_head; give --kind policy")
        raise PrerequisiteError(f"{path} has no {TRLX_REWARD_HEAD}, so it is no reward model of trlX's example")
    return {REWARD_HEAD if name == TRLX_REWARD_HEAD else name: tensor for name, tensor in weights.items()}


def checkpoint_config(kind: Kind, weights: Mapping[str, Tensor], path: Path, given: Path | None) -> GPTJConfig:
    """The shape of a checkpoint: from `given`'s config.json, or its own, or for GPT-J-6B from the tensors.

    Raises PrerequisiteError where none of these tells it.
    """
    source = given or (path if (path / CONFIG).is_file() else None)
    shape = _derived_shape(weights, path) if source is None else _read_shape(source / CONFIG, weights)
    if min(shape["n_head"], shape["rotary_dim"]) < 1 or shape["rotary_dim"] > shape["n_embd"] // shape["n_head"]:
        raise PrerequisiteError(
            f"{source}/{CONFIG}: n_embd={shape['n_embd']}, n_head={shape['n_head']} and rotary_dim="
            f"{shape['rotary_dim']} do not go together; give the model's own by --config-from DIR"
        )
    try:
        config = GPTJConfig(**shape, tie_word_embeddings=False, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    except Exception as error:  # what a wrong value raises, transformers decides
        raise PrerequisiteError(f"{source}/{CONFIG} is no GPT-J's: {first_line(error)}") from error
    if kind == "reward":
        config.num_labels = 1
    return config


def check_weights(kind: Kind, config: GPTJConfig, weights: Mapping[str, Tensor], path: Path) -> None:
    """Hold names and shapes against the model of the config. Raises PrerequisiteError listing what differs."""
    skeleton = build_skeleton(AUTO_CLASSES[kind], config, as_stored(weights), path / CONFIG)
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    if missing := sorted(wanted.keys() - weights.keys()):
        names = [TRLX_REWARD_HEAD if name == REWARD_HEAD else name for name in missing]
        raise PrerequisiteError(f"{path} lacks {len(names)} weights of {_what(kind, config)}: {_listed(names)}")
    if unknown := sorted(weights.keys() - wanted.keys()):
        raise PrerequisiteError(
            f"{path} holds {len(unknown)} tensors that {_what(kind, config)} does not have: {_listed(unknown)}; "
            "import-model reads what trlX's summarize example publishes, another model can be model.base"
        )
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise PrerequisiteError(
                f"{path}: {name} is {tuple(weights[name].shape)}, and {shape} in {_what(kind, config)}"
            )


def as_stored(weights: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """The weights as a header would describe them; they have no place in a file yet."""
    return {name: StoredTensor(DTYPE_CODES[w.dtype], tuple(w.shape), 0, 0) for name, w in weights.items()}


def _what(kind: Kind, config: GPTJConfig) -> str:
    return f"a GPT-J {kind if kind == 'policy' else 'reward model'} of {config.n_layer} blocks"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(shown, names[:LISTED])) + more


def _pickled_files(directory: Path) -> list[Path]:
    """The files that the index names where there is one, else all that look like weights."""
    index = directory / PICKLED_INDEX
    if (directory / PICKLED).is_file() or not index.is_file():
        files = [directory / PICKLED] if (directory / PICKLED).is_file() else sorted(directory.glob(PICKLES))
        if not files:
            raise PrerequisiteError(
                f"{directory} holds neither model.safetensors nor {PICKLED}; give what holds the weights"
            )
        return files
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"longer than {MAX_INDEX_BYTES} bytes")
        names = sorted(set(parse_index(index.read_bytes()).values()))
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{index} is no index of weights: {error}; {_AGAIN}") from error
    for name in names:
        if Path(name).name != name or "\0" in name or not (directory / name).is_file():
            raise PrerequisiteError(f"{directory} has no {shown(name)}, which {PICKLED_INDEX} names; {_AGAIN}")
    return [directory / name for name in names]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PrerequisiteError(f"{path} is not a safetensors file: {first_line(error)}; {_AGAIN}") from error
    weights = {name: tensor for name, tensor in tensors.items() if not is_old_buffer(name, tensor)}
    for name, tensor in weights.items():
        if tensor.dtype not in ALLOWED:
            raise PrerequisiteError(f"{path}: {shown(name)} is {tensor.dtype}, which is no weight")
    return weights


def _read_shape(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys of a config.json that say how large the model is and how its heads lie."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"longer than {MAX_CONFIG_BYTES} bytes")
        settings = parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path} cannot be read: {error}; give --config-from DIR") from error
    if settings.get("model_type") != "gptj":
        raise PrerequisiteError(
            f"{path}: model_type is {shown(settings.get('model_type'))}, and import-model reads 'gptj' alone"
        )
    for key in ("n_embd", "n_head", "rotary_dim", "n_positions"):
        if type(settings.get(key)) is not int:
            raise PrerequisiteError(
                f"{path}: {key} is {shown(settings.get(key))}, not a number; give another by --config-from DIR"
            )
    check_counts(settings, as_stored(weights), path)
    return {key: settings[key] for key in SHAPE_KEYS if key in settings}


def _derived_shape(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """GPT-J-6B's shape, its blocks and rows counted; how the heads of another one lie, no tensor tells."""
    embeddings = weights.get("transformer.wte.weight")
    if embeddings is None or embeddings.dim() != 2:
        raise PrerequisiteError(f"{path} has no transformer.wte.weight, so it is no GPT-J; {_AGAIN}")
    rows, hidden = embeddings.shape
    if hidden != SIX_BILLION["n_embd"]:
        raise PrerequisiteError(
            f"{path} has no {CONFIG}, and with a hidden size of {hidden} it is not GPT-J-6B (4096), so nothing tells "
            f"its number of heads; give --config-from DIR, a directory with the {CONFIG} that it was trained with"
        )
    blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    return SIX_BILLION | {"vocab_size": rows, "n_layer": len(blocks)}
