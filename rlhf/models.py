"""Policies and reward models: made, loaded, frozen and taken apart by their structure.

Shapes: B batch, T token. The policy is any causal LM of transformers, the reward model its
sequence-classification sister with one label. Directories are opened by `model_files`.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf.config import TinyModelConfig
from rlhf.errors import PrerequisiteError
from rlhf.gptj import use_fused_attention
from rlhf.model_files import load_model, open_config
from rlhf.prompt import PROMPT_VERSION
from rlhf.weights import StoredTensor

REWARD_HEAD = "score.weight"


def load_policy(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal LM from a model directory, in eval mode, with dropout off for good.

    Raises PrerequisiteError when the directory is no model, or lacks weights such as the LM head.
    """
    config, stored = _opened(path)
    model, missing, unused = load_model(AutoModelForCausalLM, Path(path), config, stored, dtype)
    if REWARD_HEAD in unused:  # with a tied LM head nothing would be missing
        raise PrerequisiteError(f"{path} is a reward model, not a language model: it has {REWARD_HEAD}")
    _require_all_weights(path, missing, "a language model")
    use_fused_attention(model)
    return model.to(device).eval()


def load_reward_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A one-label sequence classifier from a model directory, in eval mode, with dropout off for good.

    Raises PrerequisiteError when the directory is no model, or lacks weights such as the score head.
    """
    config, stored = _opened(path)
    if config.num_labels != 1:
        config.num_labels = 1  # a causal LM's config says 2; the missing head is then reported below
    model, missing, _ = load_model(AutoModelForSequenceClassification, Path(path), config, stored, dtype)
    _require_all_weights(path, missing, "a reward model")
    use_fused_attention(model)
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
        model = GPTJForCausalLM(config).eval()
    use_fused_attention(model)
    return model


def reward_model_from_policy(policy_path: str | Path, *, seed: int) -> PreTrainedModel:
    """The policy's backbone under a fresh score head, its weights normal with deviation 1 / sqrt(d + 1).

    Raises PrerequisiteError when the policy's config names no pad token: transformers finds the last
    token of a padded row by it.
    Source: Huang et al. 2024, detail 11.
    """
    config, stored = _opened(policy_path)
    if config.pad_token_id is None:
        raise PrerequisiteError(
            f"{policy_path}/config.json names no pad_token_id, which a reward model needs; run `rlhf sft` again"
        )
    config.num_labels = 1
    config.score_shift = 0.0
    with torch.random.fork_rng(devices=[]):  # transformers fills the absent head from the global generator
        model, missing, _ = load_model(
            AutoModelForSequenceClassification, Path(policy_path), config, stored, torch.float32
        )
    _require_all_weights(policy_path, missing - {REWARD_HEAD}, "a language model")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.score.weight.normal_(0.0, (config.hidden_size + 1) ** -0.5, generator=generator)
    stamp_prompt_version(model)
    use_fused_attention(model)
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
    # Whoever hooks into the body later, as DeepSpeed does, means that one.
    vars(view).update({name: OrderedDict() for name in vars(body) if name.endswith(("_hooks", "_pre_hooks"))})
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


def _opened(path: str | Path) -> tuple[PretrainedConfig, dict[str, StoredTensor]]:
    """A directory's config, with dropout off, and what its weight files hold. Raises PrerequisiteError."""
    config, stored = open_config(Path(path))
    _disable_dropout(config)
    return config, stored


def _disable_dropout(config: PretrainedConfig) -> None:
    """Dropout off before the modules are built: KL then starts at 0 and the ratio at 1."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _require_all_weights(path: str | Path, missing: set[str], kind: str) -> None:
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise PrerequisiteError(f"{path} is not {kind}: weights are missing: {', '.join(names[:3])}{more}")
