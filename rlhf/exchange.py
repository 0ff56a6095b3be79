"""Rollouts that processes have sampled become everybody's, so that minibatches do not depend on who sampled what.

An iteration's rollouts take the memory that they take on one process; what they cost to send is little beside what
they cost to sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.environment import EnvironmentRow
from rlhf.experience import ROLLOUT_NUMBERS, ROLLOUT_TENSORS
from rlhf.processes import process_count, process_rank
from rlhf.rollout import Rollout
from rlhf.runtime import from_all


def share_out(count: int, *, rank: int, processes: int) -> list[int]:
    """The places of a process among `count`: every so-manieth, so that each has as many of each length."""
    return list(range(rank, count, processes))


def exchange(mine: Sequence[Rollout], rows: Sequence[EnvironmentRow], device: torch.device) -> list[Rollout]:
    """The rollouts of all rows, in their order, on every process.

    mine are those of this process's places (`share_out`). All processes have to call this; the tensors come on
    `device`, the same bits everywhere.
    """
    processes = process_count()
    if processes == 1:
        return list(mine)
    numbers = from_all([{name: getattr(rollout, name) for name in ROLLOUT_NUMBERS} for rollout in mine])
    tensors = {name: all_tensors([getattr(rollout, name) for rollout in mine], device) for name in ROLLOUT_TENSORS}
    rollouts: list[Rollout | None] = [None] * len(rows)
    for rank in range(processes):
        for index, place in enumerate(share_out(len(rows), rank=rank, processes=processes)):
            fields: dict[str, Any] = {name: tensors[name][rank][index] for name in ROLLOUT_TENSORS}
            rollouts[place] = Rollout(row=rows[place], **numbers[rank][index], **fields)
    return [rollout for rollout in rollouts if rollout is not None]


def all_tensors(mine: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """What each process has, by rank, on all; of any shapes and of one type. Every process has to call it."""
    shapes = from_all([tuple(tensor.shape) for tensor in mine])
    dtype = next(dtype for dtype in from_all(mine[0].dtype if mine else None) if dtype is not None)
    sizes = [[torch.Size(shape).numel() for shape in theirs] for theirs in shapes]
    longest = max(map(sum, sizes))
    flat = torch.zeros(longest, dtype=dtype, device=device)
    if mine:
        flat[: sum(sizes[process_rank()])] = torch.cat([tensor.to(device).flatten() for tensor in mine])
    flats = [torch.empty_like(flat) for _ in shapes]
    torch.distributed.all_gather(flats, flat)
    return [
        [part.view(shape) for part, shape in zip(whole[: sum(size)].split(size), theirs, strict=True)]
        for whole, size, theirs in zip(flats, sizes, shapes, strict=True)
    ]
