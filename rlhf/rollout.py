"""A rollout: one summary sampled from the policy, with all that training on it needs.

The token ids that were sampled are the ids that are scored and trained on; nothing is decoded and
tokenised again. The frozen trunk runs once, here, and its output serves the policy's top, the
reference's top and every inner epoch.

The last token of a response goes through no network but the reward model: nothing is chosen after it.

Shapes: S rollouts, R response tokens (right-padded side by side), T tokens of prompt and response but the last,
N such tokens of all rollouts, K response tokens of all rollouts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.actor_critic import ActorCritic
from rlhf.environment import EnvironmentRow
from rlhf.generation import Engine, Generation, Sampling
from rlhf.overlap import Start, Wait
from rlhf.packing import Packed, pack
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
    """Rollouts on their way through the networks: packed prompts and responses, and the tokens that were chosen."""

    packed: Packed
    tokens_K: Tensor

    @property
    def response_mask_SR(self) -> Tensor:
        """True where a response token counts."""
        return self.packed.kept_mask()


@dataclass(frozen=True)
class Collector:
    """Everything that has a part in a rollout but the reward model."""

    actor: ActorCritic
    engine: Engine
    sampling: Sampling
    autocast: Callable[[], AbstractContextManager[None]]

    def begin(
        self, rows: Sequence[EnvironmentRow], *, chances_BR: Tensor, score: Start, watch: Stopwatch
    ) -> Callable[[], list[Rollout]]:
        """Sample a summary for each prompt, have it scored, and evaluate it under policy, reference and value function.

        What comes back waits for the scores and gives the rollouts; meanwhile more can be begun. Without rows there is
        nothing to be done, of which `score` hears: it may be waiting for other processes.
        """
        prompts = [row.prompt_ids for row in rows]
        if not rows:
            return partial(_scored, [], score(prompts), watch)
        with watch("rollout"), self.autocast():
            generation = self.engine.generate(
                prompts, self.sampling, chances_BR=chances_BR, trunk_layers=self.actor.trunk_layers
            )
        lengths = generation.response_mask_BR.sum(dim=1).tolist()
        responses = [ids_R[:length] for ids_R, length in zip(generation.response_BR.tolist(), lengths, strict=True)]
        with watch("score"):
            scores = score([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
        with watch("experience"):
            rollouts = self._look(rows, responses, generation)
        return partial(_scored, rollouts, scores, watch)

    @torch.no_grad()
    def _look(
        self, rows: Sequence[EnvironmentRow], responses: Sequence[Sequence[int]], generation: Generation
    ) -> list[Rollout]:
        """What policy, reference and value function say of the responses; scores are to come."""
        prompts, lengths = [row.prompt_ids for row in rows], [len(response) for response in responses]
        with self.autocast():
            batch = join(prompts, responses, device=generation.response_BR.device)
            trunk_NH = self._trunk(generation, batch)
            inputs = (trunk_NH, batch.packed, batch.tokens_K)
            output, reference_SR = self.actor(*inputs), self.actor.reference_logprobs(*inputs)
        gaps_SR = (output.logprobs_SR - generation.logprobs_BR).abs() * batch.response_mask_SR
        entropies, gaps = output.entropy_SR.sum(dim=1).tolist(), gaps_SR.amax(dim=1).tolist()
        # Views: without padding they are all there is.
        trunks = trunk_NH.split([len(prompt) + length - 1 for prompt, length in zip(prompts, lengths, strict=True)])
        return [
            Rollout(
                row=row,
                response_R=generation.response_BR[s, :length],
                ended=ended,
                score=math.nan,
                trunk_TH=trunks[s],
                logprobs_R=output.logprobs_SR[s, :length],
                reference_logprobs_R=reference_SR[s, :length],
                values_R=output.values_SR[s, :length],
                entropy=entropies[s] / length,
                sampler_gap=gaps[s],
            )
            for s, (row, length, ended) in enumerate(zip(rows, lengths, generation.ended_B.tolist(), strict=True))
        ]

    def _trunk(self, generation: Generation, batch: Batch) -> Tensor:
        """The trunk's hidden states, trunk_NH: kept by the engine while it sampled, or computed now."""
        if generation.trunk is not None:
            return torch.cat(generation.trunk)
        return self.actor.trunk_states(batch.packed)


def _scored(rollouts: Sequence[Rollout], scores: Wait, watch: Stopwatch) -> list[Rollout]:
    """With their scores, once they are there.

    Whoever trains on one looks at whether it is finite, and says which post's is not.
    """
    with watch("score"):
        scores_S = scores()
    return [replace(rollout, score=one) for rollout, one in zip(rollouts, scores_S.tolist(), strict=True)]


def join(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, device: torch.device) -> Batch:
    """Prompts with their responses, as the networks take them."""
    sequences = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
    packed = pack(sequences, keep=[len(response) for response in responses])
    chosen = [token for response in responses for token in response]
    return Batch(packed.to(device), torch.tensor(chosen, device=device))


def minibatch(rollouts: Sequence[Rollout]) -> tuple[Batch, Tensor]:
    """Rollouts as one batch, and their trunk states, trunk_NH."""
    prompts = [rollout.row.prompt_ids for rollout in rollouts]
    responses = [rollout.response_R.tolist() for rollout in rollouts]
    trunk_NH = torch.cat([rollout.trunk_TH for rollout in rollouts])
    return join(prompts, responses, device=trunk_NH.device), trunk_NH


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Right-pad 1-D tensors with 0 into one [S, R]."""
    return pad_sequence(list(tensors), batch_first=True)
