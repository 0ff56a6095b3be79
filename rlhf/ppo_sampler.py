"""What samples PPO's rollouts: the built-in engine, which runs the policy itself, or vLLM with a copy of its weights.

What training needs of a rollout (log-probabilities, values) is computed by the policy in either case: of the sampler
it takes the tokens alone, and measures how far its log-probabilities are from the policy's (`ppo/sampler_gap`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.adapters import has_adapters, merged_weights
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.generation import BuiltinEngine, Engine
from rlhf.runtime import torch_dtype
from rlhf.vllm_engine import VllmEngine


def open_sampler(
    config: Config, policy: PreTrainedModel, sft: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Engine:
    """The engine of `ppo.sampler` on the policy's device; sft is the directory that the policy came from.

    vLLM's is without weights until its first `sync`. It takes memory for a copy of the policy in the precision of
    computation, and for keys and values of `ppo.rollout_chunk` sequences of full length, and keeps it.
    Raises ConfigError when vLLM is not installed or does not run on the device, and PrerequisiteError when it
    cannot run the model.
    """
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if config.ppo.sampler == "builtin":
        return BuiltinEngine(policy, eos_id=eos_id, pad_id=pad_id)
    try:
        return VllmEngine(
            sft,
            eos_id=eos_id,
            pad_id=pad_id,
            slots=config.ppo.rollout_chunk,
            device=str(device),
            dtype=torch_dtype(config.runtime.precision),
            max_sequence_tokens=config.prompt.max_sequence_tokens,
            load_weights=False,
        )
    except ConfigError as error:
        raise ConfigError(f"ppo.sampler=vllm: {error}") from error


def plain_weights(policy: PreTrainedModel) -> dict[str, Tensor]:
    """A policy's weights by the names that its class gives them, its adapters merged in; the rest is not copied.

    Where a strategy shards weights, be inside its `whole()`.
    """
    weights = policy.state_dict()
    return merged_weights(policy, weights) if has_adapters(policy) else weights
