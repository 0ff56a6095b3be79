"""Whether a run fits into the memory of given machines: each stage under its own strategy and under the others.

Formulas only: no torch, no weights, an answer at once. What is added up is in `memory_stages`; here it is held
against a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.config import Config, PpoConfig, RewardConfig, SftConfig
from rlhf.errors import ConfigError
from rlhf.memory_stages import NEEDS, Need
from rlhf.memory_strategy import STRATEGIES, Parts, read_strategy
from rlhf.memory_trained import Setting
from rlhf.model_shape import ModelShape

STAGES = tuple(NEEDS)
SPREAD = ("sft", "reward", "ppo")
"""The stages that have a strategy."""

CONTEXT_BYTES = 1_500_000_000
"""What CUDA, NCCL and cuBLAS keep on a GPU beside torch's allocator."""
FRAGMENTATION = 0.04
"""Share of what is asked of torch's allocator on a GPU that lies between the pieces."""
PROCESS_BYTES = 4_000_000_000
"""A process with its libraries in host memory, on a GPU; on the CPU `CPU_PROCESS_BYTES`."""
CPU_PROCESS_BYTES = 700_000_000
POST_BYTES = 8_000
"""A post with its summary in host memory, as text and objects; its token ids come on top."""
PUBLISHED_POSTS = 117_000
"""Training posts of the published TL;DR data set."""


@dataclass(frozen=True)
class Machine:
    """Nodes alike, with so many GPUs each; bytes of one GPU, and of a node's host memory where that is known.

    device: `cuda`, or `cpu`, where a GPU stands for a process and nothing is set aside for CUDA.
    """

    nodes: int
    gpus: int
    gpu_memory: int
    host_memory: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        if min(self.nodes, self.gpus, self.gpu_memory) < 1:
            raise ConfigError(
                f"{self.nodes} node(s) of {self.gpus} GPU(s) with {self.gpu_memory} bytes: give 1 or more of each"
            )


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs on the fullest device and on the fullest node, against what is there."""

    stage: str
    strategy: str
    need: Need
    machine: Machine
    host: Parts

    @property
    def margin(self) -> int:
        """Bytes set aside for CUDA's context and for fragmentation."""
        if self.machine.device == "cpu":
            return 0
        return CONTEXT_BYTES + round(FRAGMENTATION * self.need.peak.total)

    @property
    def total(self) -> int:
        """Bytes of the fullest device."""
        return self.need.peak.total + self.margin

    @property
    def spare(self) -> int:
        """Bytes that are left on it; negative: that lack."""
        return self.machine.gpu_memory - self.total

    @property
    def host_total(self) -> int:
        """Bytes of the fullest node's host memory."""
        return sum(self.host.values())

    @property
    def host_spare(self) -> int | None:
        """Bytes left of it; None where the node's memory is not known."""
        return None if self.machine.host_memory is None else self.machine.host_memory - self.host_total

    @property
    def lacking(self) -> int:
        """Bytes that lack, on the device and in host memory together."""
        return max(-self.spare, 0) + max(-(self.host_spare or 0), 0)

    @property
    def fits(self) -> bool:
        """Whether nothing lacks."""
        return self.lacking == 0


def plan_run(config: Config, shape: ModelShape, machine: Machine) -> list[StagePlan]:
    """Each stage under the strategy that the configuration gives it. Raises ConfigError as `plan_stage`."""
    return [plan_stage(stage, config, shape, machine) for stage in STAGES]


def plan_stage(
    stage: str, config: Config, shape: ModelShape, machine: Machine, *, deepspeed: str | None = "configured"
) -> StagePlan:
    """One stage, under its own strategy or another one (a value of `<stage>.deepspeed`).

    Raises ConfigError for a DeepSpeed file that cannot be read, for more blocks than the model has, and for a
    reward model on a GPU of its own where there is only one.
    """
    if stage in SPREAD:
        chosen = section_of(stage, config).deepspeed if deepspeed == "configured" else deepspeed
        strategy = read_strategy(chosen, key=f"{stage}.deepspeed")
    else:
        strategy = read_strategy(None, key=stage)
    nodes, gpus = _processes(stage, config, machine)
    if stage == "ppo" and config.ppo.unfrozen_layers != "all" and config.ppo.unfrozen_layers > shape.layers:
        raise ConfigError(
            f"ppo.unfrozen_layers={config.ppo.unfrozen_layers} is more than the {shape.layers} blocks of {shape.name}"
        )
    need = NEEDS[stage](Setting(config, shape, strategy, nodes, gpus, machine.device))
    return StagePlan(stage, strategy.name, need, machine, _host(config, need, gpus, machine))


def section_of(stage: str, config: Config) -> SftConfig | RewardConfig | PpoConfig:
    """The settings of a stage that has a strategy."""
    if stage == "sft":
        return config.sft
    return config.reward if stage == "reward" else config.ppo


def other_strategies(stage: str, config: Config, shape: ModelShape, machine: Machine) -> Iterator[StagePlan]:
    """A stage under every strategy that is shipped, whole replicas first."""
    for name in STRATEGIES:
        yield plan_stage(stage, config, shape, machine, deepspeed=None if name == "ddp" else name)


def _processes(stage: str, config: Config, machine: Machine) -> tuple[int, int]:
    """Nodes and processes on each."""
    if stage != "ppo" or config.ppo.reward_placement != "dedicated":
        return machine.nodes, machine.gpus
    if machine.gpus < 2:
        raise ConfigError(
            "ppo.reward_placement=dedicated needs a second GPU on the node; give --gpus 2 or set it to colocated"
        )
    return 1, 1


def _host(config: Config, need: Need, processes: int, machine: Machine) -> Parts:
    """Bytes on the first process's node, by what they are for."""
    posts = config.data.max_train_posts
    if posts is None:
        posts = config.synthetic.train_posts if config.data.posts == "synthetic" else PUBLISHED_POSTS
    data = posts * (POST_BYTES + 4 * config.prompt.max_sequence_tokens)
    each = {"libraries": PROCESS_BYTES if machine.device == "cuda" else CPU_PROCESS_BYTES, "data": data}
    running = {name: size * processes for name, size in each.items()}
    at_start: Parts = {"loading the model": need.loaded * processes}
    later = {name: size * processes for name, size in need.kept.items()} | need.kept_first
    fullest = max(at_start, later, key=lambda parts: sum(parts.values()))
    return {name: size for name, size in (running | fullest).items() if size}
