"""How a training is spread over processes, behind one interface: whole replicas (DDP), or state sharded by ZeRO.

What is saved is the same under every strategy and on any number of processes: whole float32 weights, and the whole
moments of each parameter under its number in the optimiser. So a training goes on under another one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf.config import OptimizerConfig, RuntimeConfig
from rlhf.deepspeed_settings import deepspeed_file, deepspeed_settings
from rlhf.errors import ConfigError
from rlhf.processes import process_count
from rlhf.replicas import Replicas
from rlhf.runtime import ACCELERATE_PRECISION
from rlhf.step import Stepped
from rlhf.zero import ZeroShards


class Strategy(Protocol):
    """A network that several processes train together. What all of them have to call says so."""

    model: nn.Module
    """What to call in training: its backward pass synchronises gradients."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; all have as many.

        With the last one of a step the gradients are averaged over the processes.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's loss."""
        ...

    def step(self, *, clip: float, wrong: str | None = None) -> Stepped:
        """Clip the gradients to this norm, move the weights and forget the gradients; all call it.

        The weights stay where they are when `wrong` says what is wrong with the step, or a gradient is not finite.
        """
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """In the precision of computation, for calls of the network itself, where `model` does it by itself."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Every process has the network's whole weights for the while, to run it by itself; all enter and leave it."""
        ...

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The whole weights of the network or of a part, by their names in its state_dict, in host memory.

        On the first process; the others get nothing. All call it. A copy is good until the next one.
        """
        ...

    def moments(self) -> dict[str, Tensor]:
        """The whole optimiser state as `<parameter's number>.<name>`; otherwise as `weights`."""
        ...

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `moments` gave, under whatever strategy. All call it."""
        ...

    def scale_state(self) -> dict[str, Any] | None:
        """Where the search for float16's loss scale is; None in other precisions."""
        ...

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Go on with that search; a state of another strategy gives the scale alone."""
        ...


@dataclass(frozen=True)
class Share:
    """What a stage's optimiser step is to one process: so many micro-batches of so many examples."""

    micro_batch_size: int
    accumulation: int


def make_accelerator(
    deepspeed: str | None,
    *,
    key: str,
    share: Share,
    optimizer: OptimizerConfig,
    runtime: RuntimeConfig,
    device: torch.device,
) -> Accelerator:
    """Accelerate for a stage; key names the setting that chose `deepspeed`.

    Raises ConfigError for a DeepSpeed file that is not there and for float16 without a GPU.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and runtime.precision == "float16":
        raise ConfigError("runtime.precision=float16 trains on a GPU only; use bfloat16 or float32 on the CPU")
    path = deepspeed_file(deepspeed, key=key)
    if path is None:
        return Accelerator(
            mixed_precision=ACCELERATE_PRECISION[runtime.precision],
            cpu=on_cpu,
            # Else each process holds its gradients twice: 7 GB more for eight blocks of GPT-J-6B.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    join_alone(device)
    _compile_nothing()
    settings = deepspeed_settings(
        path,
        micro_batch_size=share.micro_batch_size,
        accumulation=share.accumulation,
        processes=process_count(),
        optimizer=optimizer,
        precision=runtime.precision,
    )
    native = next((name for name in ("bf16", "fp16") if settings[name]["enabled"]), "no")
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no DeepSpeed configuration: {error}; correct it") from error
    accelerator = Accelerator(
        mixed_precision=native,  # autocast is DeepSpeed's own business
        deepspeed_plugin=plugin,
        # The loop divides by what it counts; DeepSpeed wants to know all the same.
        gradient_accumulation_steps=share.accumulation,
        # Else accelerate takes each process on the CPU for the only one.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
    )
    # While this lives, transformers shards what it loads at stage 3: heads, references and adapters are made of whole
    # weights, before the engine shards them all.
    plugin.dschf = None
    return accelerator


def _compile_nothing() -> None:
    """Have DeepSpeed make no operations of its own, of which it would compile one on a CPU, for inference alone.

    Compiling takes a minute, and where a process is killed meanwhile, its lock holds up all others for good.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def join_alone(device: torch.device) -> None:
    """Make a process that is the only one a group of one, as DeepSpeed wants; see `runtime.all_processes`."""
    if not torch.distributed.is_initialized():
        assert process_count() == 1, "many processes have joined before"
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether no process has the whole weights: ZeRO's stage 3."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return plugin is not None and plugin.zero_stage == 3


def spread(accelerator: Accelerator, network: nn.Module, optimizer: AdamW, *, precision: str) -> Strategy:
    """The network and its optimiser under the strategy that accelerate was made for; weights have to be loaded."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroShards(accelerator, network, optimizer, precision=precision)
    return Replicas(accelerator, network, optimizer)
