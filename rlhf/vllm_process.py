"""vLLM inside a process that has other work: a trainer, or a service with a second engine.

vLLM is made to own its process. Here it is imported and started, and the rest of the process is kept from it.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.distributed import GroupMember, ProcessGroup

from rlhf.errors import ConfigError
from rlhf.vllm_limits import INSTALL, cache_tokens

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights reach it as tensors
    "VLLM_CONFIGURE_LOGGING": "0",  # its records go to the handlers that our entry points set up
    "VLLM_NO_USAGE_STATS": "1",
}

PREFILL_TOKENS = 8192
"""Prompt tokens read in one step, at most; a prompt may be longer than this all the same."""

_TURN = threading.Lock()


def import_vllm(device: torch.device) -> ModuleType:
    """Import vLLM, which takes some ten seconds the first time.

    What it logs goes through our handlers: errors only, unless VLLM_LOGGING_LEVEL says otherwise.
    Raises ConfigError when it is not installed, cannot be imported, or does not run on the device.
    """
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    try:
        with _TURN, _undone():
            for name in ("vllm", "vllm.inputs", "vllm.platforms", "vllm.sampling_params"):
                importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "vllm"
        reason = "is not installed" if absent else f"cannot be imported ({error})"
        raise ConfigError(f"the engine vllm was asked for, but vLLM {reason}; install it: {INSTALL}") from error
    vllm = sys.modules["vllm"]
    built_for = vllm.platforms.current_platform.device_type or "no device of this machine"
    if built_for != device.type:
        raise ConfigError(
            f"the engine vllm was asked for on {device}, but the vLLM that is installed runs on {built_for}; "
            "choose another device, or the built-in engine"
        )
    return vllm


def start_vllm(
    vllm: ModuleType,
    directory: Path,
    *,
    slots: int,
    device: torch.device,
    dtype: torch.dtype,
    weights: int,
    max_sequence_tokens: int | None,
) -> Any:
    """An LLMEngine of the model that the directory's config.json describes, with random weights, so many of them.

    It has a cache for `slots` sequences of max_sequence_tokens each, and takes no other share of a GPU. Raises vLLM's
    own errors, which are OSError, RuntimeError or ValueError, when it cannot run the model.
    """
    with turn(device), _undone():
        GroupMember.WORLD = _group_of_one()
        arguments = vllm.EngineArgs(
            model=str(directory),
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # nothing but what a request says
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_sequence_tokens,
            max_num_seqs=slots,
            max_num_batched_tokens=max(max_sequence_tokens or 0, PREFILL_TOKENS) + slots,
            # On the CPU, vLLM cannot take back what a row with a seed draws after a part of its prompt.
            enable_chunked_prefill=device.type != "cpu",
            # A prefix that another request left behind is rounded otherwise than one's own.
            enable_prefix_caching=False,
            # A head of its own: PPO trains it apart from embeddings that it was tied to.
            hf_overrides={"tie_word_embeddings": False},
            async_scheduling=False,  # a step gives the tokens that it computes
            # Capturing CUDA graphs fails when another thread of the process allocates memory meanwhile.
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
        )
        config = arguments.create_engine_config()
        cache = config.cache_config
        cache.kv_cache_memory_bytes = _cache_bytes(config, slots)
        if device.type == "cuda":
            # Before it starts, it wants this share to be free; its own default is nearly all, and others are here.
            needed = weights * dtype.itemsize + cache.kv_cache_memory_bytes
            cache.gpu_memory_utilization = min(needed / torch.cuda.mem_get_info(device)[1], 1.0)
        if device.index is not None:
            config.device_config.device = device
        engine = vllm.LLMEngine.from_vllm_config(config, disable_log_stats=True)
        engine.engine_core._finalizer.detach()  # what would shut it down; see stop_vllm
    return engine


def stop_vllm(llm: Any) -> None:
    """Make vLLM forget an engine, so that its memory is free once the caller has forgotten it, too.

    vLLM's own way to shut down would take the process groups from the other engines, and without it the notes on how
    to reload weights would hold on to the attention layers, and these to the cache.
    """
    notes = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise").LAYERWISE_INFO
    llm.apply_model(lambda model: [notes.pop(layer, None) for layer in model.modules()])


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Let one engine of the process work at a time; torch's random state comes out as it went in.

    vLLM keeps the pass that is under way in a variable of the process: engines that run at the same time in two
    threads take each other's caches and crash.
    """
    with (
        _TURN,
        _current(device),
        torch.random.fork_rng(_cuda_indices(device)),
        # Its sampler has functions under torch.compile: many seconds at the first token, and a C++ compiler.
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@contextmanager
def _undone() -> Iterator[None]:
    """Put back what importing vLLM and starting an engine change in the process.

    That is: the default process group, which a trainer may have, or make later; torch.set_num_threads, which it
    replaces; sys.excepthook; the random state of Python and NumPy; all environment variables but its own, LD_PRELOAD
    and LOCAL_WORLD_SIZE among them; and what it hides from the garbage collector.
    """
    environment, group = dict(os.environ), GroupMember.WORLD
    set_num_threads, hook = torch.set_num_threads, sys.excepthook
    python_state, numpy_state = random.getstate(), np.random.get_state()
    os.environ.update(ENVIRONMENT)
    GroupMember.WORLD = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        GroupMember.WORLD = group
        torch.set_num_threads = set_num_threads
        sys.excepthook = hook
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        _restore_environment(environment)
        gc.unfreeze()


@cache
def _group_of_one() -> ProcessGroup | None:
    """The default process group as vLLM's engines see it; left to itself, vLLM would open files for each engine."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return GroupMember.WORLD


def _restore_environment(before: dict[str, str]) -> None:
    for name in set(os.environ) | set(before):
        if name.startswith("VLLM_"):
            continue  # vLLM reads these later, too
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


def _cache_bytes(config: Any, slots: int) -> int:
    """Memory for keys and values of `slots` sequences, each as long as may be."""
    model, parallel = config.model_config, config.parallel_config
    numbers = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return numbers * model.dtype.itemsize * cache_tokens(slots, model.max_model_len)


def _current(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Every thread has a current GPU of its own, at first the first one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cuda_indices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
