"""A batch of GPT-J on its way, one row a sequence: what `kv_cache.Decoder` does, for this architecture and faster.

Prompts are a packed pass, without padding, of which the last block computes only their last tokens. Keys and values lie
in buffers that stay where they are, every row from column 0 on, the rows in use first. A step is a loop of our own over
the blocks; all that depends on lengths alone (rotations, mask, places) is computed once for all of them.

Shapes: B rows, A of them in use, N rows that join, U distinct prompts among them, M tokens of a pass, h heads, D head
size, H hidden, V vocabulary, P positions, R rotated pairs, T columns that prompts fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.block_linears import linears_of
from rlhf.cuda_graph import Advance, RecordedStep, can_record
from rlhf.gptj import FusedAttention, is_gptj, packed_states
from rlhf.models import backbone
from rlhf.packing import pack
from rlhf.row_buffers import RowBuffers, Step, moves
from rlhf.trunk_states import TrunkStates


class GptjDecoder:
    """Runs a GPT-J with fused attention on at most `rows` sequences at a time.

    fixed_steps: the weights stay as they are for so many steps, then the decoder is given up; where that pays, it works
    on copies. With 0 the model's modules are called, whose weights may change between any two calls.
    trunk: where the hidden states that enter one block are kept; rows then join once.
    cuda_graphs: record a step where that can be done; rows then neither join after the first step nor leave.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        fixed_steps: int = 0,
        trunk: TrunkStates | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self._model, self._body, self._rows, self._trunk = model, backbone(model), rows, trunk
        assert trunk is None or trunk.layers < len(self._body.h), "nothing enters a block above the last"
        attention: FusedAttention = self._body.h[0].attn
        positions_P = torch.arange(len(attention.embed_positions), device=attention.embed_positions.device)
        self._turns_P1R = attention.turns(positions_P)
        self._linears, self._head = linears_of(model, rows=rows, steps=fixed_steps)
        self._buffers = RowBuffers(layers=len(self._body.h), rows=rows)
        self._lengths: list[int] = []
        self._lengths_B = torch.zeros(rows, dtype=torch.long, device=model.device)  # the same on the device
        self._records = cuda_graphs and can_record(model)
        self._recorded: RecordedStep | None = None

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._lengths)

    def join(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Let these follow the rows in use, with columns for `room` tokens after each; a prompt that comes
        twice is computed once. Gives logits_NV of each one's first token, float32."""
        first, end = len(self), len(self) + len(prompts)
        assert end <= self._rows, "more rows than the decoder has"
        numbers: dict[tuple[int, ...], int] = {}
        source = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        self._buffers.reserve(max(lengths) + room)
        normed_NH = self._prefill(list(numbers), source)
        self._lengths += lengths
        self._lengths_B[first:end] = torch.tensor(lengths).to(self._lengths_B)
        return self._logits(normed_NH)

    def step(self, tokens_A: Tensor) -> Tensor:
        """Append a token to each row in use; gives logits_AV of the token after it, float32."""
        if self._records and self._recorded is None:
            widest = partial(self.advance, columns=self._buffers.columns)
            self._recorded = RecordedStep(widest, tokens_A, state=self._lengths_B)
        advance: Advance = self._recorded or partial(self.advance, columns=max(self._lengths) + 1)
        logits_AV, entering_AH = advance(tokens_A)
        self._lengths = [length + 1 for length in self._lengths]
        if self._trunk is not None and entering_AH is not None:
            self._trunk.add(entering_AH)
        return logits_AV

    def advance(self, tokens_A: Tensor, *, columns: int) -> tuple[Tensor, Tensor | None]:
        """The device's part of a step: logits_AV, and what entered the block above the trunk, [A, H].

        columns is how many the attention reads, at least one more than the longest row has tokens. Whatever else
        counts stands in tensors that are changed in place and never looked at, so that a CUDA graph can hold it.
        """
        lengths_A = self._lengths_B[: len(tokens_A)]
        turns_A1R, step = self._turns_P1R[lengths_A], self._buffers.step(lengths_A, columns)
        hidden_AH, entering_AH = self._body.wte(tokens_A), None
        for number in range(len(self._linears)):
            if self._trunk is not None and number == self._trunk.layers:
                entering_AH = hidden_AH
            hidden_AH = self._step_block(number, hidden_AH, turns_A1R, step)
        lengths_A += 1
        return self._logits(self._body.ln_f(hidden_AH)), entering_AH

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Take rows out; the last ones move into their places. Gives, for each row in use then, its place before."""
        assert self._recorded is None, "a recorded step is for all rows"
        order = moves(len(self), rows)
        for row, before in enumerate(order):
            if row != before:
                self._buffers.move(before, row)
        self._lengths = [self._lengths[before] for before in order]
        self._lengths_B[: len(order)] = self._lengths_B[order]
        if self._trunk is not None:
            self._trunk.leave(order)
        return order

    def _prefill(self, distinct: Sequence[Sequence[int]], source: Sequence[int]) -> Tensor:
        """Run prompts into the rows after those in use; row n of the new ones has prompt source[n].

        Gives the last block's output at each new row's last token, normed, [N, H].
        """
        first, packed = len(self), pack(distinct, keep=1).to(self._model.device)
        spans = [packed.spans[number][1] for number in source]

        def watch(number: int, entering_MH: Tensor, key_UhTD: Tensor, value_UhTD: Tensor) -> None:
            self._buffers.fill(number, first, key_UhTD, value_UhTD)
            if self._trunk is not None and number == self._trunk.layers:
                self._trunk.begin(entering_MH, spans)

        normed_UH = packed_states(self._body, packed, watch=watch)
        if len(distinct) == len(source):
            return normed_UH
        source_N = torch.tensor(source, device=normed_UH.device)
        self._buffers.repeat(first, source_N)
        return normed_UH[source_N]

    def _step_block(self, number: int, hidden_AH: Tensor, turns_A1R: Tensor, step: Step) -> Tensor:
        """Store a block's new keys and values; gives its output."""
        block, linears = self._body.h[number], self._linears[number]
        normed_AH = block.ln_1(hidden_AH)
        projected_A3H = linears.query_key_value(normed_AH)
        both = 2 * hidden_AH.shape[1]
        turned_AD = block.attn.turned(projected_A3H[:, :both], turns_A1R)
        query_AhD, key_AhD = turned_AD.chunk(2, dim=1)
        step.append(number, key_AhD, block.attn.split(projected_A3H[:, both:]))
        return linears.out(step.mix(number, query_AhD), normed_AH, hidden_AH)

    def _logits(self, normed_AH: Tensor) -> Tensor:
        return self._head(normed_AH).float()


def fits(model: PreTrainedModel) -> bool:
    """Whether GptjDecoder runs this model."""
    return is_gptj(backbone(model))
