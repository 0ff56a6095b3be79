"""Training on whole replicas: every process has all weights and all optimiser state, gradients are averaged (DDP)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf.saver import HostBuffers
from rlhf.step import Stepped
from rlhf.training_state import HostState, load_optimizer_tensors, optimizer_tensors


class Replicas:
    """The strategy (`sharding.Strategy`) of one process, and of several with a whole copy each."""

    def __init__(self, accelerator: Accelerator, network: nn.Module, optimizer: AdamW) -> None:
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._hosts: dict[nn.Module, HostState] = {}
        self._moments = HostBuffers()
        self.model, self._wrapped = accelerator.prepare(network, optimizer)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP exchanges the gradients while the last one's are computed."""
        context: AbstractContextManager[None] = nullcontext() if last else self._accelerator.no_sync(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradients, scaled in float16."""
        self._accelerator.backward(loss)

    def step(self, *, clip: float, wrong: str | None = None) -> Stepped:
        """Clip, move the weights, forget the gradients."""
        scaler, taken = self._accelerator.scaler, False
        grad_norm = float(self._accelerator.clip_grad_norm_(self.model.parameters(), clip))
        if wrong is None and scaler is None and not math.isfinite(grad_norm):
            wrong = f"the norm of the gradient is {grad_norm}"
        if wrong is None:
            self._wrapped.step()  # float16's scaler skips an overflow by itself
            # A fused optimiser is called all the same, and skips it within: accelerate does not see that.
            taken = not self._wrapped.step_was_skipped and math.isfinite(grad_norm)
        elif scaler is not None:
            scaler.update()
        self._wrapped.zero_grad()
        if scaler is not None and scaler.get_scale() < 1:
            wrong = f"the scale of float16 fell to {scaler.get_scale():g}"
        return Stepped(grad_norm, taken, wrong)

    def autocast(self) -> AbstractContextManager[None]:
        """accelerate's."""
        context: AbstractContextManager[None] = self._accelerator.autocast()
        return context

    def whole(self) -> AbstractContextManager[None]:
        """The weights are whole all the time."""
        return nullcontext()

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """A copy in host memory."""
        if not self._accelerator.is_main_process:
            return {}
        if module not in self._hosts:
            self._hosts[module] = HostState(module)
        return self._hosts[module].weights()

    def moments(self) -> dict[str, Tensor]:
        """A copy in host memory."""
        keep = self._accelerator.is_main_process
        return self._moments.copy(optimizer_tensors(self._optimizer).items(), keep=keep)

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy them to where the parameters are."""
        load_optimizer_tensors(self._optimizer, tensors)

    def scale_state(self) -> dict[str, Any] | None:
        """The scaler's."""
        scaler = self._accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Into the scaler, where there is one."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.load_state_dict(
                scaler.state_dict() | {key: state[key] for key in scaler.state_dict() if key in state}
            )
