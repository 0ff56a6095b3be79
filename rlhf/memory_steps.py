"""The fullest moments of an optimiser step, plain or with gradient checkpointing."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf import memory_activations as memory
from rlhf.memory_activations import Batch
from rlhf.memory_strategy import FLOAT, Parts, Strategy
from rlhf.memory_trained import Setting, Trained, state_of


@dataclass(frozen=True)
class Phase:
    """One of the fullest moments of a stage: bytes on a device by what they are for."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one process, and whether others follow in the step.

    positions: where the loss wants logits, of all rows; 0 in a network without an LM head. entering: bytes of the
    hidden states that the pass begins with.
    """

    batch: Batch
    positions: int
    checkpointing: bool
    accumulates: bool
    entering: int = 0


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a micro-batch.

    block, last: what these leave. turned: a gradient on its way to a bucket or to be added. first_gradients: those
    that are there when the last block's backward pass is done.
    """

    around: int
    input: int
    block: int
    last: int
    loss: int
    forward_work: int
    backward_work: int
    copies: int
    one_copy: int
    turned: int
    first_gradients: int


def step_phases(setting: Setting, trained: Trained, micro: MicroBatch) -> list[Phase]:
    """The turn from the forward to the backward pass, both ends of the backward pass, and the optimiser's step."""
    state, _ = state_of(setting, trained)
    if "gathered weights" in state:
        running = FLOAT * trained.numbers + trained.frozen_bytes + trained.reference_bytes - trained.idle_bytes
        state["gathered weights"] = min(state["gathered weights"], running)
    # A single process without accumulation has no gradients before they are computed, and frees them each step.
    growing = setting.processes == 1 and not micro.accumulates and setting.strategy.stage == 0
    before = {name: size for name, size in state.items() if not growing or name != "gradients"}
    after = _reaching_bottom(setting, trained, state) if growing else state
    sizes = _sizes(setting, trained, micro, growing=growing)
    turn = _checkpointed(setting, micro, before, sizes) if micro.checkpointing else _plain(trained, before, sizes)
    lowest = sizes.block if trained.blocks > trained.networks else sizes.last
    # The inputs of frozen blocks stay to the end.
    inputs = sizes.input * max(setting.shape.layers - trained.blocks + 1, 1) * micro.checkpointing
    last = sizes.around + lowest + inputs + sizes.backward_work + sizes.turned
    bottom = Phase("backward", after | {"precision copies": sizes.one_copy, "activations": last})
    return [*turn, bottom, Phase("step", _stepping(state, setting.strategy))]


def _sizes(setting: Setting, trained: Trained, micro: MicroBatch, *, growing: bool) -> _Sizes:
    shape, form, batch = setting.shape, setting.form(autocast=True), micro.batch
    in_full = trained.adapted is None
    loss = memory.language_loss(shape, form, positions=micro.positions, head_trained=in_full)
    first = shape.block_numbers + shape.head_numbers * (micro.positions > 0)
    return _Sizes(
        around=memory.around_blocks(shape, batch) + micro.entering,
        input=memory.block_inputs(shape, batch),
        block=memory.kept_by_block(shape, form, batch, adapted=trained.adapted),
        last=memory.kept_by_block(shape, form, batch, adapted=trained.adapted, last=True),
        loss=loss if micro.positions else 0,
        forward_work=memory.forward_work(shape, form, batch),
        backward_work=memory.backward_work(shape, form, batch),
        copies=memory.autocast_copies(trained.matrices, form),
        one_copy=memory.autocast_copies(shape.matrix_numbers * in_full, form),
        turned=FLOAT * shape.largest_numbers * (in_full and not growing),
        first_gradients=FLOAT * first * (in_full and growing),
    )


def _plain(trained: Trained, before: Parts, sizes: _Sizes) -> list[Phase]:
    """All blocks have kept what they have to, and the loss or a block's backward pass is computed."""
    lasts = min(trained.networks, trained.blocks)
    kept = sizes.around + (trained.blocks - lasts) * sizes.block + lasts * sizes.last
    below = kept - sizes.last + sizes.backward_work
    there = before | {"precision copies": sizes.copies}
    if sizes.first_gradients:
        top = there | {"gradients": sizes.first_gradients, "activations": below}
    else:
        top = there | {"activations": below + sizes.turned}
    return [
        Phase("forward", there | {"activations": kept, "logits": sizes.loss}),
        Phase("top of backward", top),
    ]


def _checkpointed(setting: Setting, micro: MicroBatch, before: Parts, sizes: _Sizes) -> list[Phase]:
    """Every block has kept its input, frozen ones too; autocast's copies go at the end of the forward pass."""
    kept = sizes.around + setting.shape.layers * sizes.input
    # ZeRO-1 and 2 take their buckets when the backward pass begins.
    late = {"buckets"} | (set() if micro.accumulates else {"gradients"})
    early = late if 0 < setting.strategy.stage < 3 else set()
    forward = {name: size for name, size in before.items() if name not in early}
    recomputed = kept + sizes.block + sizes.backward_work
    first = {"gradients": sizes.first_gradients} if sizes.first_gradients else {}
    return [
        Phase("forward", forward | {"precision copies": sizes.copies, "activations": kept + sizes.forward_work}),
        Phase("loss", before | {"activations": kept, "logits": sizes.loss}),
        Phase("top of backward", before | first | {"precision copies": sizes.one_copy, "activations": recomputed}),
    ]


def _reaching_bottom(setting: Setting, trained: Trained, state: Parts) -> Parts:
    """The state at the lowest block, where its own gradients and the embeddings' are still to come."""
    if trained.adapted is not None:
        return state
    to_come = setting.shape.block_numbers
    if trained.numbers == trained.whole:
        to_come += setting.shape.embedding_numbers
    return state | {"gradients": max(state["gradients"] - FLOAT * to_come, 0)}


def _stepping(state: Parts, strategy: Strategy) -> Parts:
    """DeepSpeed at stage 1 or 2 puts a shard's gradients into one piece of memory, beside the pieces."""
    parts = {name: size for name, size in state.items() if name != "buckets" or strategy.stage == 3}
    if 0 < strategy.stage < 3 and "gradients" in parts:
        parts["gradients"] *= 2
    return parts
