"""What vLLM needs and cannot do, for who asks before anything starts; needs neither vLLM nor torch."""

from __future__ import annotations

import math
from importlib.util import find_spec

from rlhf.config import PpoConfig
from rlhf.errors import ConfigError

INSTALL = "pip install '.[vllm]' in this project's folder"

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM takes what is lower, but not 0, for the least, and refuses more."""

CACHE_BLOCK = 128
"""vLLM hands its cache out in blocks of this many tokens on the CPU, and of a part of it on GPUs."""


def cache_tokens(slots: int, sequence_tokens: int) -> int:
    """For how many tokens vLLM keeps keys and values: `slots` sequences of full length, and its one empty block."""
    return (slots * math.ceil(sequence_tokens / CACHE_BLOCK) + 1) * CACHE_BLOCK


def check_ppo_sampler(ppo: PpoConfig) -> None:
    """Raise ConfigError, with the remedy, where `ppo.sampler` cannot be had under the other settings."""
    if ppo.sampler == "builtin":
        return
    chosen = f"ppo.sampler={ppo.sampler}"
    if find_spec("vllm") is None:
        raise ConfigError(f"{chosen}: vLLM is not installed; install it: {INSTALL}, or set ppo.sampler: builtin")
    if not MIN_TEMPERATURE <= ppo.temperature <= MAX_TEMPERATURE:
        raise ConfigError(
            f"{chosen} samples at temperatures from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, and ppo.temperature is "
            f"{ppo.temperature}; change it, or set ppo.sampler: builtin"
        )
    if ppo.lora.quantize != "none":
        raise ConfigError(
            f"{chosen} gets whole weights in one precision, and ppo.lora.quantize={ppo.lora.quantize} leaves none; "
            "set ppo.lora.quantize: none, or ppo.sampler: builtin"
        )
