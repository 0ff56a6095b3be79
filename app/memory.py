"""What a model needs in memory, told from its headers before it is loaded, and whether that is free.

Weights are exact; caches are what they can grow to; what a pass over the model takes for the moment is rough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from app.devices import free_bytes
from rlhf.errors import RlhfError
from rlhf.scoring import CPU_BATCH_TOKENS

GIB = 2**30

ROOM_REMEDY = (
    "lower APP_SLOTS, set APP_POLICY_DEVICE or APP_REWARD_DEVICE to another device, or, when another run is being "
    "served, restart the service instead of reloading it"
)
CACHE_BLOCK = 128
"""An engine sets the cache of a sequence aside in blocks of at most so many tokens."""
HIDDEN_COPIES = 20
"""Hidden states' worth of tensors alive in a block: the residual, its norm, q, k, v, what the attention gives, and
the wide MLP before, in and after its activation. GPT-J's is fused: 15, and 2 for padding in the attention's grid."""
CHOICE_BYTES = 32
"""A vocabulary entry while a token is chosen: logits in float32, their softmax and its sums in float64."""


class NoRoom(RlhfError):
    """A device has too little free memory; names both numbers and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work that a model is to be ready for.

    dtype is of the weights; sequences are in progress at once, none for a model that only scores, each of up to
    positions tokens; batch_tokens are read in one pass.
    """

    device: torch.device
    dtype: torch.dtype
    sequences: int
    positions: int
    batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a model takes on a device: its weights, its key/value cache when full, and what work takes beside."""

    device: torch.device
    weights: int
    cache: int
    work: int


def model_need(config: PretrainedConfig, parameters: int, workload: Workload) -> Need:
    """What a model of this shape and size takes."""
    text = config.get_text_config()
    size = workload.dtype.itemsize
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    token_cache = 2 * text.num_hidden_layers * key_value_heads * head_size * size
    columns = -(-workload.positions // CACHE_BLOCK) * CACHE_BLOCK
    cache = workload.sequences * columns * token_cache
    # While the cache grows, one block's part of it is there twice; nothing is read meanwhile.
    growth = cache // text.num_hidden_layers
    choice = workload.sequences * text.vocab_size * CHOICE_BYTES
    return Need(
        device=workload.device,
        weights=parameters * size,
        cache=cache,
        work=max(_reading(workload, text.hidden_size), growth) + choice,
    )


def _reading(workload: Workload, hidden: int) -> int:
    """Bytes of a pass over batch_tokens."""
    size, tokens = workload.dtype.itemsize, workload.batch_tokens
    if workload.device.type == "cpu" and workload.sequences == 0:
        tokens = max(min(tokens, CPU_BATCH_TOKENS), workload.positions)
    # Attention keeps no weights, but a mask: a byte for each pair of tokens, and once more as a number.
    return tokens * (HIDDEN_COPIES * hidden * size + (1 + size) * workload.positions)


def total_need(needs: list[Need], *, beside: bool) -> dict[torch.device, int]:
    """Bytes by device for models that are loaded one after another and then work at the same time.

    beside: models of the same kind are being served meanwhile, whose caches may yet grow to the full.
    """
    totals: dict[torch.device, int] = {}
    for need in needs:
        caches = need.cache * (2 if beside else 1)
        totals[need.device] = totals.get(need.device, 0) + need.weights + caches + need.work
    passing = [need.weights for need in needs if need.device.type != "cpu"]
    if passing:  # weights reach an accelerator through the machine's own memory, a model at a time
        cpu = torch.device("cpu")
        totals[cpu] = totals.get(cpu, 0) + max(passing)
    return totals


def check_room(need: Mapping[torch.device, int], *, free: Callable[[torch.device], int] = free_bytes) -> None:
    """Raise NoRoom naming the devices on which less is free than is needed."""
    short = []
    for device, needed in need.items():
        if needed > (there := free(device)):
            short.append(f"{needed / GIB:.1f} GiB on {device}, where {there / GIB:.1f} GiB are free")
    if short:
        raise NoRoom(f"the models need {' and '.join(short)}; {ROOM_REMEDY}")
