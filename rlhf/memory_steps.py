"""The fullest moments of an optimiser step, plain or with gradient checkpointing."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf import memory_activations as memory
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
    """Rows of one forward pass of one process, the bytes of their loss, and whether others follow in the step."""

    rows: int
    loss: int
    checkpointing: bool
    accumulates: bool


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a micro-batch. one_copy: a block's matrices in 16 bits; turned: a gradient on its way to a bucket."""

    around: int
    input: int
    block: int
    forward_work: int
    backward_work: int
    copies: int
    one_copy: int
    turned: int


def step_phases(setting: Setting, trained: Trained, micro: MicroBatch) -> list[Phase]:
    """The turn from the forward to the backward pass, the end of the backward pass, and the optimiser's step."""
    state, _ = state_of(setting, trained)
    # A single process without accumulation has no gradients before they are computed, and frees them each step.
    growing = setting.processes == 1 and not micro.accumulates and setting.strategy.stage == 0
    before = {name: size for name, size in state.items() if not growing or name != "gradients"}
    after = _reaching_bottom(setting, trained, state) if growing else state
    sizes = _sizes(setting, trained, micro, growing=growing)
    phases = (
        _checkpointed(setting, micro, before, sizes) if micro.checkpointing else [_plain(trained, micro, before, sizes)]
    )
    last = sizes.around + sizes.block + sizes.input * micro.checkpointing + sizes.backward_work + sizes.turned
    phases.append(Phase("backward", after | {"precision copies": sizes.one_copy, "activations": last}))
    phases.append(Phase("step", _stepping(state, setting.strategy)))
    return phases


def _sizes(setting: Setting, trained: Trained, micro: MicroBatch, *, growing: bool) -> _Sizes:
    shape, form = setting.shape, setting.form(autocast=True)
    size = {"rows": micro.rows, "tokens": setting.tokens}
    in_full = trained.adapted is None
    return _Sizes(
        around=memory.around_blocks(shape, **size),
        input=memory.block_inputs(shape, **size),
        block=memory.kept_by_block(shape, form, adapted=trained.adapted, **size),
        forward_work=memory.forward_work(shape, form, **size),
        backward_work=memory.backward_work(shape, form, **size),
        copies=memory.autocast_copies(trained.matrices, form),
        one_copy=memory.autocast_copies(shape.matrix_numbers * in_full, form),
        turned=FLOAT * shape.largest_numbers * (in_full and not growing),
    )


def _plain(trained: Trained, micro: MicroBatch, before: Parts, sizes: _Sizes) -> Phase:
    """All blocks have kept what they have to, and the loss or the last block is computed."""
    kept = sizes.around + trained.blocks * sizes.block + (0 if micro.loss else sizes.forward_work)
    return Phase("forward", before | {"precision copies": sizes.copies, "activations": kept, "logits": micro.loss})


def _checkpointed(setting: Setting, micro: MicroBatch, before: Parts, sizes: _Sizes) -> list[Phase]:
    """Every block has kept its input, frozen ones too; autocast's copies go at the end of the forward pass."""
    kept = sizes.around + setting.shape.layers * sizes.input
    # ZeRO-1 and 2 take their buckets when the backward pass begins.
    late = {"buckets"} | (set() if micro.accumulates else {"gradients"})
    early = late if 0 < setting.strategy.stage < 3 else set()
    forward = {name: size for name, size in before.items() if name not in early}
    recomputed = kept + sizes.block + sizes.backward_work
    return [
        Phase("forward", forward | {"precision copies": sizes.copies, "activations": kept + sizes.forward_work}),
        Phase("loss", before | {"activations": kept, "logits": micro.loss}),
        Phase("top of backward", before | {"precision copies": sizes.one_copy, "activations": recomputed}),
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
