"""The rollouts of an iteration and what is learnt from them, and how they lie in a checkpoint.

Shapes: B rollouts, R response columns, T tokens of prompt and response but the last, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf.environment import EnvironmentRow
from rlhf.errors import PrerequisiteError
from rlhf.rollout import Rollout, stack

ROLLOUT_TENSORS = ("response_R", "trunk_TH", "logprobs_R", "reference_logprobs_R", "values_R")
ROLLOUT_NUMBERS = ("ended", "score", "entropy", "sampler_gap")


@dataclass(frozen=True)
class Experience:
    """Rollouts, and the advantages and returns of their tokens; all [B, R], 0 where a column does not count."""

    rollouts: list[Rollout]
    advantages_BR: Tensor
    returns_BR: Tensor

    @cached_property
    def mask_BR(self) -> Tensor:
        """True where a response token counts."""
        return stack([torch.ones_like(rollout.response_R, dtype=torch.bool) for rollout in self.rollouts])

    @cached_property
    def logprobs_BR(self) -> Tensor:
        """The policy's, when it sampled."""
        return stack([rollout.logprobs_R for rollout in self.rollouts])

    @cached_property
    def values_BR(self) -> Tensor:
        """The value function's, when the policy sampled."""
        return stack([rollout.values_R for rollout in self.rollouts])


@dataclass
class InHand:
    """An iteration in the middle of its inner epochs: how many minibatches are done, and their metrics.

    values are the metrics of the rollouts; a minibatch that was skipped has no metrics.
    """

    experience: Experience
    values: dict[str, float]
    done: int = 0
    seen: list[dict[str, float]] = field(default_factory=list)


def in_hand_state(in_hand: InHand) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain numbers for JSON, and tensors by name, of one process's share."""
    experience = in_hand.experience
    tensors = {"advantages_BR": experience.advantages_BR, "returns_BR": experience.returns_BR}
    rows = []
    for number, rollout in enumerate(experience.rollouts):
        rows.append({"id": rollout.row.id} | {name: getattr(rollout, name) for name in ROLLOUT_NUMBERS})
        tensors |= {f"{number}.{name}": getattr(rollout, name) for name in ROLLOUT_TENSORS}
    numbers = {"values": in_hand.values, "done": in_hand.done, "seen": in_hand.seen, "rollouts": rows}
    return numbers, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_in_hand(
    numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Sequence[EnvironmentRow], device: torch.device
) -> InHand:
    """The same from a checkpoint; rows are the environment's, of which rollouts keep the id.

    Raises PrerequisiteError when the environment has other posts, or another release saved them.
    """
    by_id = {row.id: row for row in rows}
    rollouts = []
    for number, saved in enumerate(numbers["rollouts"]):
        fields: dict[str, Any] = {name: saved[name] for name in ROLLOUT_NUMBERS}
        fields |= {name: tensors[f"{number}.{name}"].to(device, copy=True) for name in ROLLOUT_TENSORS}
        if saved["id"] not in by_id:
            raise PrerequisiteError(
                f"post {saved['id']} of the saved rollouts is not in prepare/final; bring back the environment that "
                "the run began with"
            )
        rollouts.append(Rollout(row=by_id[saved["id"]], **fields))
        if len(fields["trunk_TH"]) != len(rollouts[-1].row.prompt_ids) + len(fields["response_R"]) - 1:
            raise PrerequisiteError(
                "the saved rollouts are of another release, which kept other hidden states; go on with that release, "
                "or move the newest step of ppo away"
            )
    advantages_BR, returns_BR = (tensors[name].to(device, copy=True) for name in ("advantages_BR", "returns_BR"))
    return InHand(
        Experience(rollouts, advantages_BR, returns_BR),
        values=dict(numbers["values"]),
        done=numbers["done"],
        seen=list(numbers["seen"]),
    )
