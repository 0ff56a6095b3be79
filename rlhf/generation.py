"""Sampling token ids from a causal LM: the interface, and our own engine.

The engine runs any causal LM of transformers: one pass over the prompts, then one token a step over the keys and
values kept. Ids go in and ids come out; nothing is decoded on the way.

Shapes: B prompts, A rows still in the batch, R response columns (right-padded), V vocabulary, H hidden. Masks are True
where a token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.decoding import RowDecoder, keeps_trunk, open_decoder
from rlhf.errors import RlhfError
from rlhf.sampling import Sampling, choose_tokens
from rlhf.sequences import check_sequences
from rlhf.slots import RunningBatch, SlotBatch
from rlhf.trunk_states import TrunkStates

STEPS_BETWEEN_CHECKS = 8
"""On an accelerator, asking whether all rows have ended waits for it; so it is asked this seldom there."""


@dataclass
class Generation:
    """Responses side by side, in the order of the prompts; R is the longest one's length.

    response_BR: int64, pad where masked. response_mask_BR: bool, EOS included. logprobs_BR: float32, of the
    full softmax at the sampling temperature (greedy: at 1), 0 where masked. ended_B: whether EOS came.
    trunk: where asked for, of each prompt and its response without the last token the hidden states below a block,
    [tokens, H]; views of one tensor.
    """

    response_BR: Tensor
    response_mask_BR: Tensor
    logprobs_BR: Tensor
    ended_B: Tensor
    trunk: list[Tensor] | None = None


class Engine(Protocol):
    """Whatever can write responses and take new weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        chances_BR: Tensor | None = None,
        trunk_layers: int | None = None,
    ) -> Generation:
        """A response to each prompt, all in one batch. Without a generator, torch's own is used.

        chances_BR are uniform numbers that were drawn before, one a token, in a generator's place. An engine that can
        keeps the hidden states after the first trunk_layers blocks.
        """
        ...

    def open(self, slots: int) -> RunningBatch:
        """An empty batch of at most this many rows, which join and leave one by one."""
        ...

    def sync(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over the policy's weights."""
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be used after this."""
        ...


class BuiltinEngine:
    """Runs the model it is given, where it is and in its own precision; it may be in training meanwhile.

    An engine that shares its model with a trainer sees every optimiser step and needs no `sync`.
    cuda_graphs: on a GPU, have `generate` record a plain GPT-J's step and replay it; all rows then run to the end of
    the longest. Not yet tried on a GPU, so off.
    """

    def __init__(self, model: PreTrainedModel, *, eos_id: int, pad_id: int, cuda_graphs: bool = False) -> None:
        self._model = model
        self._eos_id = eos_id
        self._pad_id = pad_id
        self._cuda_graphs = cuda_graphs

    # no_grad, not inference_mode: what comes out is used in training, which inference tensors refuse.
    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        chances_BR: Tensor | None = None,
        trunk_layers: int | None = None,
    ) -> Generation:
        """A response to each prompt, all in one batch, on the model's device.

        chances_BR are uniform numbers that were drawn before, one a token, in place of a generator's.
        With trunk_layers n above 0, a GPT-J's hidden states after its first n blocks are kept of every token that it
        reads; of other architectures none are. Greedy, a prompt's response does not depend on the other prompts;
        sampled, the same chances and prompts give the same responses. Raises ValueError for prompts that the model
        cannot take and RlhfError when its log-probabilities are not finite.
        """
        if len(prompts) == 0:
            raise ValueError("no prompts: give at least one")
        check_sequences(prompts, self._model, kind="prompt", room=sampling.max_new_tokens)
        if chances_BR is None:
            chances_BR = draw_chances((len(prompts), sampling.max_new_tokens), generator)
        most, trunk = sampling.max_new_tokens, None
        if trunk_layers and keeps_trunk(self._model):
            trunk = TrunkStates(prompts, layers=trunk_layers, room=most)
        decoder = open_decoder(
            self._model,
            rows=len(prompts),
            pad_id=self._pad_id,
            fixed_steps=most,
            trunk=trunk,
            cuda_graphs=self._cuda_graphs,
        )
        with _evaluating(self._model):
            written = self._write(decoder, prompts, sampling, chances_BR.to(self._model.device))
        return _generation(*written, eos_id=self._eos_id, pad_id=self._pad_id, trunk=trunk)

    def _write(
        self, decoder: RowDecoder, prompts: Sequence[Sequence[int]], sampling: Sampling, chances_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities, [B, R] both; what follows a row's EOS means nothing."""
        device, most = chances_BR.device, sampling.max_new_tokens
        tokens_BR = torch.full((len(prompts), most), self._pad_id, device=device)
        logprobs_BR = torch.zeros((len(prompts), most), device=device)
        rows_A = torch.arange(len(prompts), device=device)
        alive_A = torch.ones_like(rows_A, dtype=torch.bool)
        check_every = 1 if device.type == "cpu" else STEPS_BETWEEN_CHECKS
        logits_AV = decoder.join(prompts, room=most)
        for step in range(most):
            blocked = self._eos_id if step < sampling.min_new_tokens else None
            tokens_A, logprobs_A = choose_tokens(logits_AV, sampling, chances_BR[rows_A, step], blocked=blocked)
            tokens_BR[rows_A, step] = tokens_A
            logprobs_BR[rows_A, step] = logprobs_A
            if step + 1 == most:
                break
            alive_A &= tokens_A != self._eos_id
            if (step + 1) % check_every == 0 and (ended := (~alive_A).nonzero().squeeze(1).tolist()):
                if len(ended) == len(rows_A):
                    return tokens_BR[:, : step + 1], logprobs_BR[:, : step + 1]
                if not self._cuda_graphs:
                    order = decoder.leave(ended)
                    rows_A, alive_A, tokens_A = rows_A[order], alive_A[order], tokens_A[order]
            logits_AV = decoder.step(tokens_A)
        return tokens_BR, logprobs_BR

    def open(self, slots: int) -> RunningBatch:
        """An empty running batch; the model must stay in eval mode while it is used."""
        return SlotBatch(self._model, slots=slots, eos_id=self._eos_id, pad_id=self._pad_id)

    def sync(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the policy's weights into the model. Raises RuntimeError naming those that do not fit."""
        self._model.load_state_dict(state_dict)

    def close(self) -> None:
        """Nothing: the model belongs to whoever gave it."""


@dataclass(frozen=True)
class Summaries:
    """Responses as lists of ids, EOS included, and whether each ended by EOS; in the order of the prompts."""

    responses: list[list[int]]
    ended: list[bool]

    @property
    def mean_tokens(self) -> float:
        """Average length, EOS included."""
        return sum(map(len, self.responses)) / len(self.responses)

    @property
    def ended_fraction(self) -> float:
        """Share that ended by EOS."""
        return sum(self.ended) / len(self.ended)


def summarize(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    generator: torch.Generator | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Summaries:
    """Responses to any number of prompts, in their order; prompts of like length share a batch.

    on_progress hears after each batch how many prompts are done.
    """
    # The longest first: a batch that does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    responses: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        generation = engine.generate([prompts[index] for index in chunk], sampling, generator=generator)
        lengths_B = generation.response_mask_BR.sum(dim=1).tolist()
        ids_BR, ended_B = generation.response_BR.tolist(), generation.ended_B.tolist()
        for row, index in enumerate(chunk):
            responses[index], ended[index] = ids_BR[row][: lengths_B[row]], ended_B[row]
        if on_progress is not None:
            on_progress(start + len(chunk))
    return Summaries(responses, ended)


def _generation(
    tokens_BR: Tensor, logprobs_BR: Tensor, *, eos_id: int, pad_id: int, trunk: TrunkStates | None
) -> Generation:
    """End each row with its first EOS, and all with the longest; RlhfError for a log-probability that is not finite."""
    eos_BR = tokens_BR == eos_id
    mask_BR = eos_BR.cumsum(dim=1) - eos_BR.long() == 0
    logprobs_BR = logprobs_BR.where(mask_BR, 0.0)
    if not bool(logprobs_BR.isfinite().all()):
        raise RlhfError("the policy's log-probabilities are not finite; lower the learning rate or use float32")
    lengths = mask_BR.sum(dim=1).tolist()
    longest = slice(max(lengths))
    return Generation(
        response_BR=tokens_BR.where(mask_BR, pad_id)[:, longest],
        response_mask_BR=mask_BR[:, longest],
        logprobs_BR=logprobs_BR[:, longest],
        ended_B=eos_BR.any(dim=1),
        trunk=None if trunk is None else trunk.of_sequences(lengths),
    )


def draw_chances(shape_BR: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """One uniform number a token, all drawn beforehand.

    What a row samples then depends on its own numbers, not on which other rows have ended.
    """
    device = "cpu" if generator is None else generator.device
    return torch.rand(shape_BR, generator=generator, device=device, dtype=torch.float64)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the while: in training mode, gradient checkpointing would switch the cache off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
