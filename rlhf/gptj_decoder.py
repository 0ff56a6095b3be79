"""A batch of GPT-J on its way, one row a sequence: what `kv_cache.Decoder` does, for this architecture and faster.

Prompts are packed, without padding, and the last block computes only their last tokens. Keys and values lie in
buffers that stay where they are, every row from column 0 on, the rows in use first. A step is a loop of our own over
the blocks; all that depends on lengths alone (rotations, mask, places) is computed once for all of them.

Shapes: B rows, A of them in use, N rows that join, U distinct prompts among them, M tokens of a pass, K of them whose
output is read, Q queries a row, h heads, D head size, H hidden, V vocabulary, P positions, R rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.block_linears import BlockLinears, linears_of, module_linears
from rlhf.cuda_graph import Advance, RecordedStep, can_record
from rlhf.gptj import FusedAttention, attend, is_gptj
from rlhf.models import backbone
from rlhf.packing import Grid, pack
from rlhf.row_buffers import RowBuffers, moves
from rlhf.trunk_states import TrunkStates


@dataclass
class _Pass:
    """What the blocks of one pass have in common.

    turns_M1R are its tokens' rotations, places where their keys and values belong. The attention reads the first
    `columns` columns of the rows from first to end, which `read` holds once they are there; seen is its mask (None:
    causal) and queries its grid (None: one query a row). kept_K are the tokens whose output is read, None for all.
    """

    linears: Sequence[BlockLinears]
    turns_M1R: Tensor
    places: Tensor
    first: int
    end: int
    columns: int
    seen: Tensor | None
    queries: Grid | None = None
    kept_K: Tensor | None = None
    read: tuple[Tensor, ...] = ()


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
        self._heads = attention.heads
        positions_P = torch.arange(len(attention.embed_positions), device=attention.embed_positions.device)
        self._turns_P1R = attention.turns(positions_P)
        self._reading = module_linears(model)
        self._writing, self._head = linears_of(model, rows=rows, steps=fixed_steps)
        self._buffers = RowBuffers(layers=len(self._body.h), rows=rows, heads=attention.heads)
        self._lengths: list[int] = []
        # The same on the device, and each row's number.
        self._lengths_B = torch.zeros(rows, dtype=torch.long, device=model.device)
        self._numbers_B = torch.arange(rows, device=model.device)
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
        hidden_NH = self._prefill(list(numbers), source)
        self._lengths += lengths
        self._lengths_B[first:end] = torch.tensor(lengths).to(self._lengths_B)
        return self._logits(hidden_NH)

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
        rows = len(tokens_A)
        lengths_A = self._lengths_B[:rows]
        this = _Pass(
            linears=self._writing,
            turns_M1R=self._turns_P1R[lengths_A],
            places=self._buffers.places(self._numbers_B[:rows], lengths_A),
            first=0,
            end=rows,
            columns=columns,
            seen=self._buffers.seen(lengths_A, columns),
        )
        hidden_AH, entering_AH = self._through_blocks(self._body.wte(tokens_A), this, this)
        lengths_A += 1
        return self._logits(hidden_AH), entering_AH

    def leave(self, rows: Sequence[int], *, spoiled: bool = False) -> list[int]:
        """Take rows out; the last ones move into their places. Gives, for each row in use then, its place before.

        spoiled: they may hold NaN, which would reach the next rows in their places even through a mask.
        """
        assert self._recorded is None, "a recorded step is for all rows"
        order = moves(len(self), rows)
        if spoiled:
            self._buffers.wipe(rows)
        for row, before in enumerate(order):
            if row != before:
                self._buffers.move(before, row, columns=self._lengths[before])
        self._lengths = [self._lengths[before] for before in order]
        self._lengths_B[: len(order)] = self._lengths_B[order]
        if self._trunk is not None:
            self._trunk.leave(order)
        return order

    def _prefill(self, distinct: Sequence[Sequence[int]], source: Sequence[int]) -> Tensor:
        """Run prompts into the rows after those in use; row n of the new ones has prompt source[n].

        Gives the last block's output at each new row's last token, [N, H].
        """
        first, packed = len(self), pack(distinct, keep=1).to(self._model.device)
        grid, kept = packed.tokens, packed.kept
        assert kept is not None, "one token of each is kept"
        row_M, column_M = grid.places_M // grid.columns, grid.places_M % grid.columns
        every = _Pass(
            linears=self._reading,
            turns_M1R=self._turns_P1R[packed.positions_N],
            places=self._buffers.places(row_M + first, column_M),
            first=first,
            end=first + len(distinct),
            columns=grid.columns,
            queries=grid,
            seen=None,
        )
        last = replace(every, queries=kept.queries, seen=kept.seen_B1QT, kept_K=kept.index_K)
        hidden_UH, entering_MH = self._through_blocks(self._body.wte(packed.ids_N), every, last)
        if self._trunk is not None and entering_MH is not None:
            self._trunk.begin(entering_MH, [packed.spans[number][1] for number in source])
        if len(distinct) == len(source):
            return hidden_UH
        source_N = torch.tensor(source, device=hidden_UH.device)
        self._buffers.repeat(first, source_N)
        return hidden_UH[source_N]

    def _through_blocks(self, hidden_MH: Tensor, every: _Pass, last: _Pass) -> tuple[Tensor, Tensor | None]:
        """The last block's output at the tokens that are read, and what entered the block above the trunk."""
        entering_MH = None
        above, top = self._trunk.layers if self._trunk is not None else -1, len(self._body.h) - 1
        for number, block in enumerate(self._body.h):
            if number == above:
                entering_MH = hidden_MH
            hidden_MH = self._run_block(number, block.ln_1, hidden_MH, last if number == top else every)
        return hidden_MH, entering_MH

    def _run_block(self, number: int, norm: nn.LayerNorm, hidden_MH: Tensor, this: _Pass) -> Tensor:
        """Store a block's new keys and values; gives its output at the tokens that are read, [K, H]."""
        linears, hidden_KH, turns_K1R = this.linears[number], hidden_MH, this.turns_M1R
        normed_KH = normed_MH = norm(hidden_MH)
        key_value = linears.key_value(normed_MH)
        self._turn(key_value, this.turns_M1R)
        self._buffers.store(number, this.places, key_value)
        if this.kept_K is not None:
            hidden_KH, normed_KH, turns_K1R = hidden_MH[this.kept_K], normed_MH[this.kept_K], turns_K1R[this.kept_K]
        query_KH = linears.query(normed_KH)
        self._turn(query_KH, turns_K1R)
        mixed_KH = self._mix(number, query_KH, this)
        return linears.out(mixed_KH) + linears.mlp(normed_KH) + hidden_KH

    def _turn(self, projected: Tensor, turns_M1R: Tensor) -> None:
        """`FusedAttention.turned` in place, of each token's first H entries: queries, or keys beside their values."""
        hidden, pairs = self._body.config.hidden_size, turns_M1R.shape[-1]
        pairs_MhR2 = projected[:, :hidden].view(len(projected), self._heads, -1, 2)[:, :, :pairs]
        if projected.dtype == torch.float32:
            torch.view_as_complex(pairs_MhR2).mul_(turns_M1R)
        else:
            pairs_MhR2.copy_(torch.view_as_real(torch.view_as_complex(pairs_MhR2.float()) * turns_M1R))

    def _mix(self, number: int, query_KH: Tensor, this: _Pass) -> Tensor:
        """What a block's queries attend to: [K, H]."""
        if not this.read:
            this.read = self._buffers.read(this.first, this.end, this.columns)
        keys, values = this.read[2 * number : 2 * number + 2]
        if this.queries is None:
            query_BhQD = query_KH.view(len(query_KH), self._heads, 1, -1)
            return attend(query_BhQD, keys, values, seen=this.seen).reshape(query_KH.shape)
        query_BQH = this.queries.spread(query_KH)
        query_BhQD = query_BQH.unflatten(-1, (self._heads, -1)).transpose(1, 2)
        mixed_BhQD = attend(query_BhQD, keys, values, seen=this.seen)
        return this.queries.gather(mixed_BhQD.transpose(1, 2)).flatten(1)

    def _logits(self, hidden_KH: Tensor) -> Tensor:
        normed_KH: Tensor = self._body.ln_f(hidden_KH)
        return self._head(normed_KH).float()


def fits(model: PreTrainedModel) -> bool:
    """Whether GptjDecoder runs this model."""
    return is_gptj(backbone(model))
