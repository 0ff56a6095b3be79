"""A rollout: one summary sampled from the policy, with all that training on it needs.

The token ids that were sampled are the ids that are scored and trained on; nothing is decoded and
tokenised again. The frozen trunk runs once, here, and its output serves the policy's top, the
reference's top and every inner epoch.

Shapes: B rollouts, P prompt columns (left-padded), R response columns (right-padded), T = P + R, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.actor_critic import ActorCritic
from rlhf.environment import EnvironmentRow
from rlhf.generation import BuiltinEngine, Sampling
from rlhf.sequences import left_pad
from rlhf.telemetry import Stopwatch


@dataclass(frozen=True)
class Rollout:
    """One sampled summary; tensors without padding, on the policy's device."""

    row: EnvironmentRow
    response_R: Tensor
    ended: bool
    score: float
    trunk_TH: Tensor
    logprobs_R: Tensor
    reference_logprobs_R: Tensor
    values_R: Tensor
    entropy: float
    sampler_gap: float


@dataclass(frozen=True)
class Batch:
    """Rollouts side by side, as the model takes them. Masks are True where a token counts."""

    ids_BT: Tensor
    mask_BT: Tensor
    response_mask_BR: Tensor
    response_start: int


Score = Callable[[Sequence[Sequence[int]]], Tensor]
"""Gives scores_B of token sequences, which need not be finite."""


@dataclass(frozen=True)
class Collector:
    """Everything that has a part in a rollout but the reward model."""

    actor: ActorCritic
    engine: BuiltinEngine
    sampling: Sampling
    pad_id: int
    autocast: Callable[[], AbstractContextManager[None]]

    def collect(
        self, rows: Sequence[EnvironmentRow], *, chances_BR: Tensor, score: Score, watch: Stopwatch
    ) -> list[Rollout]:
        """Sample a summary for each prompt and evaluate it under policy, reference, value and reward model.

        Without rows there is nothing to be done, of which `score` hears: it may be waiting for other processes.
        """
        if not rows:
            score([])
            return []
        prompts = [row.prompt_ids for row in rows]
        with watch("rollout"), self.autocast():
            generation = self.engine.generate(prompts, self.sampling, chances_BR=chances_BR)
        lengths_B = generation.response_mask_BR.sum(dim=1).tolist()
        responses = [ids_R[:length] for ids_R, length in zip(generation.response_BR, lengths_B, strict=True)]
        with watch("score"):
            # Whoever trains on it looks at whether a score is finite, and says which post's is not.
            scores_B = score([p + r.tolist() for p, r in zip(prompts, responses, strict=True)])
        with watch("experience"), self.autocast(), torch.no_grad():
            batch = join(prompts, responses, pad_id=self.pad_id, device=generation.response_BR.device)
            trunk_BTH = self.actor.trunk_states(batch.ids_BT, batch.mask_BT)
            inputs = (trunk_BTH, batch.ids_BT, batch.mask_BT, batch.response_start)
            output, reference_BR = self.actor(*inputs), self.actor.reference_logprobs(*inputs)
        firsts_B = [batch.response_start - len(prompt) for prompt in prompts]
        gaps_BR = (output.logprobs_BR - generation.logprobs_BR).abs() * batch.response_mask_BR
        return [
            Rollout(
                row=row,
                response_R=responses[b],
                ended=bool(generation.ended_B[b]),
                score=float(scores_B[b]),
                # Cloned, so that the padded batch can be freed.
                trunk_TH=trunk_BTH[b, firsts_B[b] : batch.response_start + length].clone(),
                logprobs_R=output.logprobs_BR[b, :length],
                reference_logprobs_R=reference_BR[b, :length],
                values_R=output.values_BR[b, :length],
                entropy=float(output.entropy_BR[b, :length].mean()),
                sampler_gap=float(gaps_BR[b].max()),
            )
            for b, (row, length) in enumerate(zip(rows, lengths_B, strict=True))
        ]


def join(prompts: Sequence[Sequence[int]], responses: Sequence[Tensor], *, pad_id: int, device: torch.device) -> Batch:
    """Left-pad the prompts, right-pad the responses, and put them together."""
    prompt_BP, prompt_mask_BP = left_pad(prompts, pad_id)
    response_BR = pad_sequence(list(responses), batch_first=True, padding_value=pad_id)
    lengths_B = torch.tensor([len(response) for response in responses])
    mask_BR = torch.arange(response_BR.shape[1]) < lengths_B[:, None]
    return Batch(
        ids_BT=torch.cat([prompt_BP.to(device), response_BR.to(device)], dim=1),
        mask_BT=torch.cat([prompt_mask_BP, mask_BR], dim=1).to(device),
        response_mask_BR=mask_BR.to(device),
        response_start=prompt_BP.shape[1],
    )


def minibatch(rollouts: Sequence[Rollout], *, pad_id: int) -> tuple[Batch, Tensor]:
    """Rollouts as one batch, and their trunk states [B, T, H] under the same padding."""
    batch = join(
        [rollout.row.prompt_ids for rollout in rollouts],
        [rollout.response_R for rollout in rollouts],
        pad_id=pad_id,
        device=rollouts[0].trunk_TH.device,
    )
    sample = rollouts[0].trunk_TH
    trunk_BTH = sample.new_zeros(*batch.ids_BT.shape, sample.shape[1])
    for b, rollout in enumerate(rollouts):
        first = batch.response_start - len(rollout.row.prompt_ids)
        trunk_BTH[b, first : first + len(rollout.trunk_TH)] = rollout.trunk_TH
    return batch, trunk_BTH


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Right-pad 1-D tensors with 0 into one [B, R]."""
    return pad_sequence(list(tensors), batch_first=True)
