"""What a training has to remember beside its weights, as named tensors and plain numbers; nothing is pickled.

`rlhf.training` and PPO save these in safetensors and JSON and put them back, so that a resumed run is the run
that was never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf.runtime import from_all
from rlhf.saver import HostBuffers

OPTIMIZER_FILE, RANDOM_FILE, STATE_FILE = "optimizer.safetensors", "random.safetensors", "training_state.json"
"""Where a checkpoint keeps optimizer_tensors, random_states and its plain numbers."""


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and step counts as `<parameter's number>.<name>`; none before its first step.

    The tensors are the optimiser's own: copy them before it goes on (`saver.HostBuffers`).
    """
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, entry in state.items() for name, tensor in entry.items()}


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what optimizer_tensors gave; learning rates stay (see load_schedule).

    Raises ValueError when a moment has another shape than its parameter, or none is there for it.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        # Copied: what safetensors loads is mapped from the checkpoint, which is pruned or cut one day.
        state.setdefault(int(number), {})[name] = tensor.clone()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state.items():
        shapes = {tuple(tensor.shape) for tensor in moments.values() if tensor.dim()}
        if index >= len(parameters) or shapes - {tuple(parameters[index].shape)}:
            raise ValueError(f"the saved moments {index} of shape {shapes} belong to no parameter of this model")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_schedule(schedule: LambdaLR, steps: int) -> None:
    """Put a schedule after so many of its steps (`schedule.last_epoch`), and its optimiser's learning rates there."""
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": steps, "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def random_states() -> dict[str, Tensor]:
    """Where the random generators of all processes are, as `<rank>.<generator>`; every process has to call this."""
    everyones = enumerate(from_all(_random_state()))
    return {f"{rank}.{name}": tensor for rank, state in everyones for name, tensor in state.items()}


def load_random_states(states: Mapping[str, Tensor]) -> None:
    """Put this process's generators back. A process that was not there then keeps what its seed gave it."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    prefix = f"{rank}."
    mine = {key.removeprefix(prefix): tensor for key, tensor in states.items() if key.startswith(prefix)}
    if not mine:
        return
    python, numpy = mine["python"].tolist(), mine["numpy"].numpy()
    random.setstate((3, tuple(python), _known(mine["python_gauss"])))
    gauss = _known(mine["numpy_gauss"])
    np.random.set_state(("MT19937", numpy[:-1].astype(np.uint32), int(numpy[-1]), int(gauss is not None), gauss or 0.0))
    torch.set_rng_state(mine["torch"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])


def _random_state() -> dict[str, Tensor]:
    """Of this process: Python's, NumPy's, torch's on the CPU and on the process's own GPU."""
    _, python, python_gauss = random.getstate()
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(python, dtype=torch.int64),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, words), position], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss] if has_gauss else [], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _known(value: Tensor) -> float | None:
    """The second of a pair of Gaussian numbers, where one is left over."""
    return float(value[0]) if len(value) else None


class HostState:
    """A model's weights in host memory, for a save in the background.

    A copy is good until the next one. Weights that never change are copied once. `whole` gives a weight that is
    sharded over processes as it is without; without `keep` it is asked for, since it may take all processes, and
    nothing else happens.
    """

    def __init__(
        self, model: nn.Module, *, whole: Callable[[Tensor], Tensor] = lambda weight: weight, keep: bool = True
    ) -> None:
        self._model, self._whole, self._keep = model, whole, keep
        self._frozen: dict[str, Tensor] | None = None
        self._weights = HostBuffers()

    def weights(self) -> dict[str, Tensor]:
        """The weights as `model.state_dict()` names them; names of one weight there share their copy."""
        named = self._model.state_dict(keep_vars=True)
        owner: dict[int, str] = {}
        owners = {name: owner.setdefault(id(weight), name) for name, weight in named.items()}
        trained = {name: named[name] for name in owner.values() if named[name].requires_grad}
        if self._frozen is None:
            still = ((name, named[name]) for name in owner.values() if name not in trained)
            self._frozen = self._copied(HostBuffers(), still)
        copies = self._frozen | self._copied(self._weights, trained.items())
        return {name: copies[first] for name, first in owners.items()} if self._keep else {}

    def _copied(self, buffers: HostBuffers, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return buffers.copy(((name, self._whole(weight)) for name, weight in weights), keep=self._keep)
