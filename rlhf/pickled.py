"""Weights that were published as pickles only, as GPT-J-6B's are: their tensors are taken out, and nothing else.

A pickle is a program. torch's reader of weights alone (`weights_only`) knows a short list of what such a program may
call, all of which make tensors, and refuses anything else. `fetch` asks for it where `model.pickled` is `convert`,
writes safetensors once, and every stage after it reads those; `import-model` reads published checkpoints this way.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from rlhf.errors import PrerequisiteError
from rlhf.quoting import one_line, shown
from rlhf.weights import PICKLES, SAFETENSORS

logger = logging.getLogger(__name__)

ALLOWED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def is_pickled(directory: Path) -> bool:
    """Whether a model directory has pickled weights and no others."""
    return any(directory.glob(PICKLES)) and not any(directory.glob(SAFETENSORS))


def convert_pickled(directory: Path, target: Path) -> Path:
    """Write a model directory's pickled weights into `target` as safetensors, with its other small files beside them.

    Sizes and dtypes are looked at before memory is taken: the files are mapped, and no tensor may claim more bytes
    than its file has. Raises PrerequisiteError for a file that holds anything but tensors.
    """
    weights: dict[str, Tensor] = {}
    for path in sorted(directory.glob(PICKLES)):
        weights |= read_pickle(path)
    if not weights:
        raise PrerequisiteError(f"{directory} holds no {PICKLES}; give another model.base")
    target.mkdir()
    for path in directory.glob("*.json"):
        if not path.name.endswith(".bin.index.json"):
            shutil.copyfile(path, target / path.name)
    save_torch_state_dict(weights, target)
    logger.info("converted pickled weights path=%s tensors=%d", directory, len(weights))
    return target


def is_old_buffer(name: str, tensor: Tensor) -> bool:
    """Whether this is a buffer of an older release of transformers, which the present ones make themselves.

    By name and shape: a causal mask [1, 1, P, P], what it puts in place of a masked score (one number), and the
    table of GPT-J's rotary positions [P, 2F].
    """
    if name.endswith(".attn.bias"):
        return tensor.dim() == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    if name.endswith(".attn.masked_bias"):
        return tensor.numel() == 1
    return name.endswith(".attn.embed_positions") and tensor.dim() == 2


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, mapped from it, without old buffers.

    Raises PrerequisiteError for a file that holds anything but tensors, or one that claims more than the file has.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = one_line(str(error))[:200]
        raise PrerequisiteError(f"{path} does not hold tensors alone, or is damaged: {reason}") from error
    if not isinstance(content, dict):
        raise PrerequisiteError(f"{path} holds a {type(content).__name__} instead of tensors by name")
    size, weights = path.stat().st_size, {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise PrerequisiteError(f"{path}: {shown(name)} is a {type(tensor).__name__} instead of a tensor")
        if is_old_buffer(name, tensor):
            continue
        if tensor.dtype not in ALLOWED or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise PrerequisiteError(f"{path}: {shown(name)} is {tensor.dtype} on {tensor.device}, which is no weight")
        if tensor.numel() * tensor.element_size() > size:
            raise PrerequisiteError(f"{path}: {shown(name)} claims more bytes than its file has")
        weights[name] = tensor
    return weights
