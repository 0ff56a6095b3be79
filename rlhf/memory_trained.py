"""What a stage trains, what it keeps frozen beside that, and the state of both between two steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.config import Config, LoraConfig
from rlhf.memory_activations import Numerics, numerics
from rlhf.memory_strategy import FLOAT, Parts, Strategy, training_state
from rlhf.model_shape import ModelShape

QUANTISED_BYTES = 4.13 / 8
"""A weight of QLoRA: NF4, with its share of the scales (rlhf.quantized)."""


@dataclass(frozen=True)
class Setting:
    """A stage's surroundings; strategy is the stage's own."""

    config: Config
    shape: ModelShape
    strategy: Strategy
    nodes: int
    gpus: int
    device: str

    @property
    def processes(self) -> int:
        """One a GPU, on all nodes."""
        return self.nodes * self.gpus

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return self.config.prompt.max_sequence_tokens

    @property
    def choosing_tokens(self) -> int:
        """Of them those after which a token is chosen; the last one of a response goes through no causal LM."""
        return self.tokens - 1

    @property
    def width(self) -> int:
        """Bytes of a frozen weight."""
        return 4 if self.config.runtime.precision == "float32" else 2

    def form(self, *, autocast: bool) -> Numerics:
        """In what the passes of this run compute."""
        return numerics(self.config.runtime.precision, autocast=autocast, device=self.device)


@dataclass(frozen=True)
class Trained:
    """What a stage trains.

    numbers: parameters; matrices: those that autocast copies; blocks: that keep activations, of so many networks.
    frozen_bytes: of the same network; reference_bytes: of PPO's frozen copy; idle_bytes: of those of both that no
    training step runs through. whole: parameters of the network.
    """

    numbers: int
    matrices: int
    blocks: int
    frozen_bytes: int
    whole: int
    adapted: tuple[str, ...] | None = None
    reference_bytes: int = 0
    networks: int = 1
    idle_bytes: int = 0


def adapter_numbers(shape: ModelShape, lora: LoraConfig, *, layers: int) -> int:
    """Parameters of the adapters in the top so many blocks."""
    assert lora.rank is not None, "no adapters"
    block = sum(lora.rank * (linear.inputs + linear.outputs) for linear in shape.linears if linear.name in lora.targets)
    return layers * block


def trained_sft(setting: Setting) -> Trained:
    """All weights of the policy, or adapters in all of its blocks."""
    shape, lora = setting.shape, setting.config.sft.lora
    if lora.rank is not None:
        return _trained_adapters(setting, lora, also=0, layers=shape.layers, whole=shape.policy_numbers)
    matrices = shape.layers * shape.matrix_numbers + shape.head_numbers
    return Trained(shape.policy_numbers, matrices, shape.layers, 0, shape.policy_numbers)


def trained_reward(setting: Setting) -> Trained:
    """The blocks that are not frozen and the score head, or adapters in all blocks and the head."""
    shape, section = setting.shape, setting.config.reward
    if section.lora.rank is not None:
        also, layers = shape.hidden, shape.layers
        return _trained_adapters(setting, section.lora, also=also, layers=layers, whole=shape.reward_numbers)
    frozen = math.ceil(section.frozen_fraction * shape.layers - 1e-9)
    still = frozen * shape.block_numbers + shape.embedding_numbers * (frozen > 0)
    top = shape.layers - frozen
    return Trained(shape.reward_numbers - still, top * shape.matrix_numbers, top, FLOAT * still, shape.reward_numbers)


def _trained_adapters(setting: Setting, lora: LoraConfig, *, also: int, layers: int, whole: int) -> Trained:
    """Adapters in the top layers, and `also` numbers in full; the rest is frozen in the run's precision."""
    shape = setting.shape
    numbers = adapter_numbers(shape, lora, layers=layers) + also
    frozen = setting.width * (whole - also)
    if lora.quantize == "4bit":
        matrices = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
        frozen -= round((setting.width - QUANTISED_BYTES) * matrices)
    return Trained(numbers, numbers - also, layers, frozen, whole, lora.targets)


def trained_ppo(setting: Setting) -> tuple[Trained, int]:
    """What PPO trains, and how many numbers of it are the value function's."""
    shape, ppo = setting.shape, setting.config.ppo
    separate = ppo.value_network == "separate"
    value = shape.reward_numbers if separate else 2 * shape.hidden * (shape.hidden + 2) + 1
    value_matrices = shape.layers * shape.matrix_numbers if separate else 0
    top = shape.layers if ppo.unfrozen_layers == "all" else min(ppo.unfrozen_layers, shape.layers)
    kept, networks = top + (shape.layers if separate else 0), 1 + separate
    if ppo.lora.rank is not None:
        found = _trained_adapters(setting, ppo.lora, also=0, layers=top, whole=shape.policy_numbers)
        matrices, frozen, whole = found.matrices + value_matrices, found.frozen_bytes, found.whole + value
        numbers = found.numbers + value
        return Trained(numbers, matrices, kept, frozen, whole, ppo.lora.targets, networks=networks), value
    if ppo.unfrozen_layers == "all":
        policy, still = shape.policy_numbers, 0
    else:
        policy = top * shape.block_numbers + shape.final_norm + shape.head_numbers
        still = shape.embedding_numbers + (shape.layers - top) * shape.block_numbers
    matrices = top * shape.matrix_numbers + shape.head_numbers + value_matrices
    width, whole = setting.width, policy + still + value
    reference = width * policy
    idle = width * still + reference
    return Trained(policy + value, matrices, kept, width * still, whole, None, reference, networks, idle), value


def state_of(setting: Setting, trained: Trained) -> tuple[Parts, Parts]:
    """Bytes on a device while its process trains, and offloaded to host memory beside it."""
    # ZeRO-3 shards what lies in the same module, PPO's reference too.
    frozen = trained.frozen_bytes + trained.reference_bytes * (setting.strategy.stage == 3)
    return training_state(setting.strategy, trained=trained.numbers, frozen_bytes=frozen, processes=setting.processes)


def resting_state(setting: Setting, trained: Trained) -> Parts:
    """The state between two steps, with the whole weights on each device."""
    state, _ = state_of(setting, trained)
    gone = {0: {"gradients"} if setting.processes == 1 else set(), 3: set()}.get(
        setting.strategy.stage, {"gradients", "buckets"}
    )
    parts = {name: size for name, size in state.items() if name not in gone}
    if setting.strategy.stage == 3:
        parts["gathered weights"] = FLOAT * trained.numbers + trained.frozen_bytes + trained.reference_bytes
    return parts
