"""Policies and reward models: made, loaded, frozen and taken apart by their structure.

Shapes: B batch, T token. The policy is any causal LM of transformers, the reward model its
sequence-classification sister with one label. Weights are safetensors; no code from a model directory runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rlhf.config import TinyModelConfig
from rlhf.errors import PrerequisiteError
from rlhf.prompt import PROMPT_VERSION

REWARD_HEAD = "score.weight"


def load_policy(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal LM from a model directory, in eval mode, with dropout off for good.

    Raises PrerequisiteError when the directory is no model, or lacks weights such as the LM head.
    """
    model, missing, unused = _load(AutoModelForCausalLM, path, read_config(path), dtype)
    if REWARD_HEAD in unused:  # with a tied LM head nothing would be missing
        raise PrerequisiteError(f"{path} is a reward model, not a language model: it has {REWARD_HEAD}")
    _require_all_weights(path, missing, "a language model")
    return model.to(device).eval()


def load_reward_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A one-label sequence classifier from a model directory, in eval mode, with dropout off for good.

    Raises PrerequisiteError when the directory is no model, or lacks weights such as the score head.
    """
    config = read_config(path)
    if config.num_labels != 1:
        config.num_labels = 1  # a causal LM's config says 2; the missing head is then reported below
    model, missing, _ = _load(AutoModelForSequenceClassification, path, config, dtype)
    _require_all_weights(path, missing, "a reward model")
    return model.to(device).eval()


def create_tiny_gptj(
    shape: TinyModelConfig, *, positions: int, vocab_size: int, eos_id: int, pad_id: int, seed: int
) -> PreTrainedModel:
    """A GPT-J of the given shape with random weights; the same seed gives the same bits."""
    config = GPTJConfig(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        rotary_dim=shape.rotary_dim,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    _disable_dropout(config)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTJForCausalLM(config).eval()


def reward_model_from_policy(policy_path: str | Path, *, seed: int) -> PreTrainedModel:
    """The policy's backbone under a fresh score head, its weights normal with deviation 1 / sqrt(d + 1).

    Raises PrerequisiteError when the policy's config names no pad token: transformers finds the last
    token of a padded row by it.
    Source: Huang et al. 2024, detail 11.
    """
    config = read_config(policy_path)
    if config.pad_token_id is None:
        raise PrerequisiteError(
            f"{policy_path}/config.json names no pad_token_id, which a reward model needs; run `rlhf sft` again"
        )
    config.num_labels = 1
    config.score_shift = 0.0
    with torch.random.fork_rng(devices=[]):  # transformers fills the absent head from the global generator
        model, missing, _ = _load(AutoModelForSequenceClassification, policy_path, config, torch.float32)
    _require_all_weights(policy_path, missing - {REWARD_HEAD}, "a language model")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.score.weight.normal_(0.0, (config.hidden_size + 1) ** -0.5, generator=generator)
    stamp_prompt_version(model)
    return model.eval()


def score_shift(model: PreTrainedModel) -> float:
    """What the published score takes off the logit, so that references average 0; 0.0 where unset."""
    return float(getattr(model.config, "score_shift", 0.0))


def stamp_prompt_version(model: PreTrainedModel) -> None:
    """Write the prompt format that the model is trained on into its config, which every save keeps."""
    model.config.prompt_version = PROMPT_VERSION


def position_ids(mask_BT: Tensor) -> Tensor:
    """Positions that count only real tokens, so that padding on either side changes nothing."""
    return (mask_BT.long().cumsum(-1) - 1).clamp(min=0)


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The module that holds the transformer blocks: the one with a ModuleList as long as the config says.

    Raises ValueError where there is none.
    """
    layers = model.config.num_hidden_layers
    for module in model.modules():
        if any(isinstance(child, nn.ModuleList) and len(child) == layers for child in module.children()):
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {layers} blocks; choose another model.base")


def blocks(body: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a backbone, from the bottom."""
    return getattr(body, _blocks_name(body))


def freeze_bottom(model: PreTrainedModel, fraction: float) -> int:
    """Freeze the embeddings and the bottom `fraction` of the blocks, rounded up; gives the blocks frozen.

    With a fraction of 0 nothing is frozen. Rounding as in trlX, which rounds the unfrozen ones down.
    """
    body = backbone(model)
    count = math.ceil(fraction * len(blocks(body)) - 1e-9)
    if count:
        embeddings = [child for child in body.children() if isinstance(child, nn.Embedding)]
        for module in (*embeddings, *blocks(body)[:count]):
            module.requires_grad_(False)
    return count


def split_backbone(body: PreTrainedModel, top_layers: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two views of one backbone, sharing its weights: (trunk, top).

    trunk(ids) gives the hidden states below the top blocks, before the final norm;
    top(inputs_embeds=those) goes on to the final hidden states. Both need the mask and the position ids.
    Raises ValueError for learned absolute positions (GPT-2, OPT), which the top would add a second time.
    """
    layers = blocks(body)
    if not 1 <= top_layers <= len(layers):
        raise ValueError(f"ppo.unfrozen_layers={top_layers} is not between 1 and the model's {len(layers)} blocks")
    embeddings = [name for name, child in body.named_children() if isinstance(child, nn.Embedding)]
    if len(embeddings) != 1:
        raise ValueError(
            f"ppo.unfrozen_layers={top_layers}: {type(body).__name__} has learned absolute positions and cannot "
            "be split into trunk and top; set ppo.unfrozen_layers: all"
        )
    bottom = len(layers) - top_layers
    trunk = _view(body, slice(0, bottom), _final_norm_name(body))
    top = _view(body, slice(bottom, len(layers)), embeddings[0])
    return trunk, top


def _view(body: PreTrainedModel, layers: slice, without: str) -> PreTrainedModel:
    """A shallow copy of a backbone with some of its blocks and with one child left out."""
    kept = blocks(body)[layers]
    view = copy.copy(body)
    view._modules = {**body._modules, _blocks_name(body): kept, without: nn.Identity()}
    view.config = copy.deepcopy(body.config)
    view.config.num_hidden_layers = len(kept)
    if getattr(body.config, "layer_types", None) is not None:
        view.config.layer_types = body.config.layer_types[layers]
    return view


def _blocks_name(body: PreTrainedModel) -> str:
    layers = body.config.num_hidden_layers
    names = [name for name, child in body.named_children() if isinstance(child, nn.ModuleList) and len(child) == layers]
    assert names, f"{type(body).__name__} is not a backbone"
    return names[0]


def _final_norm_name(body: PreTrainedModel) -> str:
    names = [name for name, _ in body.named_children()]
    after = names[names.index(_blocks_name(body)) + 1 :]
    norms = [name for name in after if "norm" in type(getattr(body, name)).__name__.lower()]
    if not norms:
        raise ValueError(f"{type(body).__name__} has no norm after its blocks; set ppo.unfrozen_layers: all")
    return norms[-1]


def read_config(path: str | Path) -> PretrainedConfig:
    """A model directory's config, with dropout off. Raises PrerequisiteError where there is none that can be read."""
    if not Path(path, "config.json").is_file():
        raise PrerequisiteError(f"{path} holds no model: config.json is missing; run the stage that makes it")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path}/config.json is not one of transformers': {_first_line(error)}") from error
    _disable_dropout(config)
    return config


def _disable_dropout(config: PretrainedConfig) -> None:
    """Dropout off before the modules are built: KL then starts at 0 and the ratio at 1."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _load(
    auto_class: Any, path: str | Path, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the weights that its files lack (transformers makes those up) and the unused ones."""
    attention = {"attn_implementation": "eager"} if config.model_type == "gptj" else {}
    try:
        with quiet_transformers():
            model, report = auto_class.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **attention,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise PrerequisiteError(f"{path} cannot be loaded as a model: {_first_line(error)}") from error
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise PrerequisiteError(f"{path}: {name} is {tuple(stored)} in the file, {tuple(wanted)} in config.json")
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def _require_all_weights(path: str | Path, missing: set[str], kind: str) -> None:
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise PrerequisiteError(f"{path} is not {kind}: weights are missing: {', '.join(names[:3])}{more}")


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
