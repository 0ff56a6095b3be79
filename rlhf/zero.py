"""Training under DeepSpeed's ZeRO: gradients and optimiser state are sharded over the processes, or the weights too.

Everything that this project knows of DeepSpeed's engine is here. The engine's own checkpoints are not used: they are
pickles, and good for one strategy and one number of processes only.

Source of what is sharded: Rajbhandari et al. 2020, ZeRO, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf.processes import process_rank
from rlhf.runtime import torch_dtype
from rlhf.saver import HostBuffers
from rlhf.step import Stepped
from rlhf.training_state import HostState

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroShards:
    """The strategy (`sharding.Strategy`) of DeepSpeed at ZeRO stage 1, 2 or 3."""

    def __init__(self, accelerator: Accelerator, network: nn.Module, optimizer: AdamW, *, precision: str) -> None:
        self._first = accelerator.is_main_process
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._optimizer = optimizer  # DeepSpeed gives it flat shards in place of the parameters
        self._hosts: dict[nn.Module, HostState] = {}
        self._moments = HostBuffers()
        self._autocast = (accelerator.device.type, torch_dtype(precision))
        self.model, _ = accelerator.prepare(network, optimizer)
        if self._searches:  # a collapse is told by `step`
            self._scaler.raise_error_at_min_scale = False

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimiser, which wraps ours."""
        return self.model.optimizer

    @property
    def _scaler(self) -> Any:
        return self._zero.loss_scaler

    @property
    def _searches(self) -> bool:
        """Whether the engine seeks float16's loss scale."""
        return bool(self.model.fp16_enabled() and self._scaler.dynamic)

    @property
    def _sharded_weights(self) -> bool:
        return int(self.model.zero_optimization_stage()) == 3

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Tell the engine whether a step follows."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients; each is reduced to the process that keeps its shard."""
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, *, clip: float, wrong: str | None = None) -> Stepped:
        """Move the weights; the norm to clip to is in the engine's settings. What is not finite is skipped."""
        at_the_end = self._searches and self._scaler.cur_scale <= self._scaler.min_scale
        self.model.step()
        grad_norm = float(self.model.get_global_grad_norm())
        taken = math.isfinite(grad_norm)
        if not taken and at_the_end:
            wrong = f"the scale of float16 fell to {self._scaler.cur_scale:g}"
        elif not taken and not self._searches:
            wrong = wrong or f"the norm of the gradient is {grad_norm}"
        return Stepped(grad_norm, taken, wrong)

    def autocast(self) -> AbstractContextManager[None]:
        """torch's; the engine's own has the same precision."""
        device, dtype = self._autocast
        return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the weights once; else each module would fetch its own again for every token that is generated."""
        if not self._sharded_weights:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        # The hook that begins a pass through the root asks all processes, which do not call it equally often here.
        offload = self._zero.parameter_offload
        offload.fwd_pre_hook.remove()
        with unwrap_model_for_generation(self.model):
            yield
        offload.fwd_pre_hook = offload.module.register_forward_pre_hook(
            lambda module, *_: offload.get_param_coordinator().reset_step()
        )

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Gathered one by one, each copied to host memory on the first process."""
        if module not in self._hosts:
            self._hosts[module] = HostState(module, whole=self._whole_weight, keep=self._first)
        return self._hosts[module].weights()

    def moments(self) -> dict[str, Tensor]:
        """Gathered one by one, each copied to host memory on the first process; none before the first step."""
        return self._moments.copy(self._gathered_moments(), keep=self._first)

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Give each process the shards of its own."""
        steps = [tensor for name, tensor in tensors.items() if name.endswith(".step")]
        if not steps:
            return
        fused = bool(self._optimizer.defaults.get("fused"))
        for flat in self._flat_shards():
            self._optimizer.state[flat] = {
                "step": steps[0].to(flat.device if fused else "cpu", copy=True),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link_moments()
        for number, parameter in enumerate(self._parameters):
            for name in MOMENTS:
                self._load_moment(parameter, name, tensors[f"{number}.{name}"])

    def scale_state(self) -> dict[str, Any] | None:
        """The engine's, where it seeks one."""
        if not self._searches:
            return None
        scaler = self._scaler
        return {"scale": scaler.cur_scale, "cur_iter": scaler.cur_iter, "last_overflow_iter": scaler.last_overflow_iter}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Into the engine's scaler."""
        if self._searches:
            scaler = self._scaler
            scaler.cur_scale = state["scale"]
            scaler.cur_iter = state.get("cur_iter", scaler.cur_iter)
            scaler.last_overflow_iter = state.get("last_overflow_iter", scaler.last_overflow_iter)

    def _whole_weight(self, weight: Tensor) -> Tensor:
        """A weight from all its shards: of a trained one the float32 master."""
        import deepspeed

        if weight.requires_grad:
            whole: Tensor = deepspeed.utils.safe_get_full_fp32_param(weight)
            return whole
        if not hasattr(weight, "ds_id"):
            return weight
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    def _gathered_moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._optimizer.state.get(self._flat_shards()[0], {}).get("step")
        if step is None:
            return
        self._link_moments()
        for number, parameter in enumerate(self._parameters):
            yield f"{number}.step", step
            for name in MOMENTS:
                yield f"{number}.{name}", safe_get_full_optimizer_state(parameter, name)

    def _link_moments(self) -> None:
        """Tell each parameter where its moments are in the flat shards.

        At stages 1 and 2 DeepSpeed does it once, after the first step of the first group, when others have none yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._sharded_weights:
            return
        for parameters, flat in zip(self._zero.bit16_groups, self._flat_shards(), strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.state)

    def _load_moment(self, parameter: Tensor, name: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        value = value.to(parameter.device)
        if not self._sharded_weights:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        shard = safe_get_local_optimizer_state(parameter, name)
        # Shards are of equal size, so that the last ones may reach beyond the end.
        start = shard.numel() * process_rank()
        mine, part = torch.zeros_like(shard), value.flatten()[start : start + shard.numel()]
        mine[: part.numel()] = part
        safe_set_local_optimizer_state(parameter, mine, name)

    def _flat_shards(self) -> list[Tensor]:
        """What DeepSpeed has our optimiser move: float32 shards of many parameters each."""
        if self._sharded_weights:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)
