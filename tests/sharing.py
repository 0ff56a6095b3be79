"""Trainings that several processes share, compared with those of one process: gradients at each step, and weights.

Starting processes takes longer than a tiny training, so processes that are started once run a list of orders. Each
order is a stage of a run; at each optimiser step the whole gradients are written down as `gradients/<step>`, under
the parameters' numbers in the optimiser.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf import training
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.deepspeed_settings import deepspeed_file
from rlhf.errors import StopRequested
from rlhf.launcher.rendezvous import free_port
from rlhf.pipeline import STAGES
from rlhf.presets import load_config
from rlhf.processes import is_first_process
from rlhf.replicas import Replicas
from rlhf.running import run_stage
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from rlhf.zero import ZeroShards
from tests.conftest import REPOSITORY
from tests.tiny_run import fetched_run, tiny_config

# Nine steps; the seventh is an epoch's last and has two examples, which is fewer than four processes.
# With the usual epsilon of 1e-8, Adam makes steps of full size out of gradients that are nothing but rounding.
OPTIMIZER = {"learning_rate": 3e-3, "warmup_steps": 2, "eps": 1e-4}
TRAINING = {
    "optimizer": OPTIMIZER,
    "micro_batch_size": 1,
    "max_steps": 9,
    "epochs": 2,
    "eval_every_steps": 9,
    "save_every_steps": 9,
}
PPO = {
    "iterations": 2,
    "unfrozen_layers": 1,
    "rollouts_per_iteration": 8,
    "rollout_chunk": 4,
    "inner_epochs": 2,
    "minibatch_size": 4,
    "micro_batch_size": 2,
    "eval_posts": 5,
    "eval_every_iterations": 1,
    "save_every_iterations": 5,
    "optimizer": OPTIMIZER | {"warmup_steps": 0},
}
RUNTIME = {"device": "cpu", "tensorboard": False, "log_every_steps": 1, "keep_checkpoints": 9}

Gradients = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Order:
    """A stage of a run, with settings from a file; stop_after: the last process is asked to stop after so many steps.

    Steps are the optimiser's: PPO's are minibatches, so that it is stopped in the middle of an iteration.
    """

    stage: str
    run_dir: str
    config: str
    stop_after: int | None = None

    @property
    def directory(self) -> StageDir:
        """The stage's folder."""
        return StageDir(Path(self.run_dir), self.stage)


def run(orders: Sequence[Order], *, processes: int, within: float = 240) -> None:
    """Run the orders one after another in new processes, on the CPU; AssertionError, with the log, when one fails."""
    port, workers = free_port(), []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.sharing", *(json.dumps(asdict(order)) for order in orders)]
        environment = os.environ | {name: str(value) for name, value in place.items()}
        workers.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        logs = [worker.communicate(timeout=within)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(log[-3000:] for log in logs)


def run_here(order: Order, *, gradients: bool = True) -> None:
    """Run an order in this process, as one of those that share it or alone."""
    assert not order.directory.is_final(), "it would be passed over"
    stop = StopSignal()
    stage = next(one for one in STAGES if one.name == order.stage)
    with written_down(order) if gradients else nullcontext(), stopped(order, stop):
        try:
            run_stage(stage, load_config(order.config), Path(order.run_dir), stop)
        except StopRequested:
            assert order.stop_after is not None
        finally:
            # accelerate keeps a process's precision for good; a stage has a process of its own.
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def written_down(order: Order) -> Iterator[None]:
    """Write the gradients of each step, numbered from where the stage's other ones end."""
    folder = order.directory.path / "gradients"

    def watched(kind: Any) -> Any:
        original = kind.step

        def step(strategy: Any, **how: Any) -> Any:
            found = whole_gradients(strategy)
            if is_first_process():
                folder.mkdir(parents=True, exist_ok=True)
                save_file(found, folder / f"{len(list(folder.iterdir())):05d}")
            return original(strategy, **how)

        return mock.patch.object(kind, "step", step)

    with watched(Replicas), watched(ZeroShards):
        yield


def whole_gradients(strategy: Any) -> dict[str, Tensor]:
    """The whole gradients that a step is about to take; all processes have to call it."""
    if isinstance(strategy, ZeroShards):
        from deepspeed.utils import safe_get_full_grad

        return {str(number): safe_get_full_grad(p).clone() for number, p in enumerate(strategy._parameters)}
    parameters = [parameter for group in strategy._optimizer.param_groups for parameter in group["params"]]
    return {str(number): parameter.grad.clone() for number, parameter in enumerate(parameters)}


@contextmanager
def stopped(order: Order, stop: StopSignal) -> Iterator[None]:
    """Have the last process asked to stop."""
    module, name = (ppo, "optimise_minibatch") if order.stage == "ppo" else (training, "optimise")
    original, steps = getattr(module, name), 0

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == order.stop_after and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
            stop.request()
        return original(*arguments)

    with mock.patch.object(module, name, counted):
        yield


class Place:
    """A folder of runs that begin alike."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = Config.model_validate(
            tiny_config(sft=TRAINING, reward=TRAINING).model_dump() | {"ppo": PPO, "runtime": RUNTIME}
        )
        self.run_dir = fetched_run(folder / "alone")

    def run_alone(self) -> None:
        """SFT, reward model, environment and PPO of one process without DeepSpeed, in this one."""
        for stage in ("sft", "reward", "prepare", "ppo"):
            run_here(self.alone(Order(stage, "", str(self._settings(stage, None)))), gradients=stage != "prepare")

    def alone(self, order: Order) -> Order:
        """The same stage of that run."""
        return replace(order, run_dir=str(self.run_dir), stop_after=None)

    def order(self, stage: str, strategy: str | None = None, *, name: str, **changes: Any) -> Order:
        """A stage of a run of its own, which has the stages before it from the run alone."""
        run_dir = self.folder / f"{name}-{stage}" / "tiny"
        for before in ("fetch", "sft", "reward", "prepare"):
            if before == stage:
                break
            if not (run_dir / before).exists():
                shutil.copytree(self.run_dir / before, run_dir / before, symlinks=True)
        return Order(stage, str(run_dir), str(self._settings(stage, strategy)), **changes)

    def _settings(self, stage: str, strategy: str | None) -> Path:
        path = self.folder / f"{stage}-{strategy}.yaml"
        tree = self.config.model_dump(mode="json")
        if strategy:
            tree[stage]["deepspeed"] = str(self._deepspeed(strategy))
        path.write_text(Config.model_validate(tree).to_yaml())
        return path

    def _deepspeed(self, strategy: str) -> Path:
        """As we ship it, except that stage 3 keeps no weights whole for being small."""
        settings = json.loads(Path(str(deepspeed_file(strategy, key=""))).read_text())
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = self.folder / f"{strategy}.json"
        path.write_text(json.dumps(settings))
        return path


@dataclass(frozen=True)
class Difference:
    """How far two runs of a stage are apart.

    gradients: the largest, over the steps, of the norm of their difference over the norm of the gradient. weights:
    the largest difference in the end.
    """

    steps: int
    gradients: float
    weights: float


def difference(ours: Order, theirs: Order) -> Difference:
    """Between two finished runs, over all steps, parameters and weights."""
    first, second = (read_gradients(order) for order in (ours, theirs))
    assert first.keys() == second.keys()
    apart = 0.0
    for step, expected in second.items():
        assert first[step].keys() == expected.keys()
        changes = [first[step][name] - gradient for name, gradient in expected.items()]
        apart = max(apart, float(norm(changes) / norm(expected.values())))
    return Difference(len(second), apart, weights_apart(ours.directory.final(), theirs.directory.final()))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of all of them as one vector."""
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def weights_apart(ours: Path, theirs: Path) -> float:
    """The largest difference between the weights of two models, which have the same names and types."""
    weights, others = (load_file(directory / "model.safetensors") for directory in (ours, theirs))
    assert weights.keys() == others.keys()
    assert {tensor.dtype for tensor in weights.values()} == {tensor.dtype for tensor in others.values()}
    return max(float((weights[name].float() - others[name].float()).abs().max()) for name in others)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Bit for bit."""
    assert weights_apart(ours, theirs) == 0


def read_gradients(order: Order) -> Gradients:
    """By step, counted from 0."""
    return {int(path.name): load_file(path) for path in (order.directory.path / "gradients").iterdir()}


def main() -> None:
    """What each process does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for order in sys.argv[1:]:
        run_here(Order(**json.loads(order)))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
