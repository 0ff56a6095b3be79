"""What each phase must spend, and what the machine could do it in: the limit that `bench` measures against.

The model is a GPT-J: in each block attention and MLP read the same normed hidden state. Its matrices hold 12 H^2
numbers: H^2 each for query, key, value and output, 4 H^2 each for the MLP's two. A product of a token's vector with a
matrix of n numbers costs 2 n floating-point operations (FLOPs), a multiplication and an addition each. A query that
looks at t tokens costs 4 t H in a layer: 2 t H for the products with the keys, 2 t H for the sum of the values. All
else (norms, rotation, softmax, activation, embedding) is left out: it is of the order of H, not of H^2.

Work counts what an ideal implementation must spend, not what ours does:

- no padding, no query that looks at a token after it
- in the last block, query, output and MLP only for tokens whose final hidden state is read; keys and values for all
- the LM head at tokens that are read only
- weights are read once a pass, keys and values once a step; activations cost no traffic, as though they stayed in cache
- the frozen trunk once a rollout, in sampling; reference summaries scored before

A phase is a sequence of passes, each as long as the longer of its arithmetic and its traffic.

Shapes: B sequences, P prompt tokens, R response tokens, L layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

QUERY_SIDE, KEY_SIDE = 10, 2
"""Matrices of H^2 numbers in a block that only a token which is read needs (query, output, MLP), and that all need."""
ADAMW_PASSES = 7
"""Of the weights' size: weight, gradient and both moments are read, weight and both moments written."""


@dataclass(frozen=True)
class Machine:
    """What a device does at best: FLOPs a second in products of matrices, bytes a second from and to memory."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a pass, which can overlap each other."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, count: float) -> Work:
        return Work(self.flops * count, self.bytes * count)

    def seconds(self, machine: Machine) -> float:
        """At the machine's limit."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


@dataclass(frozen=True)
class Phase:
    """Passes one after another."""

    passes: tuple[Work, ...]

    @property
    def work(self) -> Work:
        """All passes together."""
        return sum(self.passes, Work())

    def seconds(self, machine: Machine) -> float:
        """At the machine's limit."""
        return sum(one.seconds(machine) for one in self.passes)


@dataclass(frozen=True)
class Shape:
    """A model: unfrozen counts the blocks that PPO trains; number_bytes is of a weight where nothing trains it."""

    layers: int
    unfrozen: int
    hidden: int
    vocabulary: int
    number_bytes: int = 4

    @property
    def matrix(self) -> int:
        """Numbers of a square matrix."""
        return self.hidden**2

    @property
    def block(self) -> int:
        """Numbers of a block's matrices."""
        return (QUERY_SIDE + KEY_SIDE) * self.matrix

    @property
    def head(self) -> int:
        """Numbers of the LM head."""
        return self.hidden * self.vocabulary

    @property
    def value_head(self) -> int:
        """Numbers of the value head: H to 2 H to 1."""
        return 2 * self.matrix + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Of embeddings, blocks and LM head; without norms and biases."""
        return 2 * self.head + self.layers * self.block


def attention(shape: Shape, *, first: int, last: int) -> float:
    """FLOPs in a layer of one sequence's queries number `first` to `last`, counted from 1, each of them causal."""
    return 4 * shape.hidden * (last * (last + 1) - (first - 1) * first) / 2


def blocks(shape: Shape, layers: int, *, rows: int, tokens: int, read: int | None = None) -> float:
    """FLOPs of whole sequences through some blocks; read says how many tokens at the end the last one is needed for.

    None is all tokens, as where more blocks follow.
    """
    if layers == 0:
        return 0.0
    read = tokens if read is None else read
    whole = tokens * 2 * shape.block + attention(shape, first=1, last=tokens)
    last = 2 * shape.matrix * (KEY_SIDE * tokens + QUERY_SIDE * read)
    last += attention(shape, first=tokens - read + 1, last=tokens)
    return rows * ((layers - 1) * whole + last)


def plain_forward(shape: Shape, *, rows: int, tokens: int) -> float:
    """FLOPs of a forward pass as transformers does it: queries look at all tokens, logits at every position."""
    linear = tokens * 2 * (shape.layers * shape.block + shape.head)
    return rows * (linear + shape.layers * 4 * shape.hidden * tokens**2)


def prefill(shape: Shape, *, rows: int, prompt: int, passes: int = 1) -> Phase:
    """Prompts up to the first token's logits, in so many passes of `rows`; keys and values are written."""
    flops = blocks(shape, shape.layers, rows=rows, tokens=prompt, read=1) + rows * 2 * shape.head
    weights = shape.layers * shape.block + shape.head
    return Phase((Work(flops, shape.number_bytes * (weights + _cached(shape, rows, prompt))),) * passes)


def decode(shape: Shape, *, rows: int, prompt: int, response: int, passes: int = 1) -> Phase:
    """The tokens after the first: R - 1 steps, in each of which every weight is read and every key and value."""
    steps = []
    for done in range(1, response):
        context = prompt + done
        flops = rows * 2 * (shape.layers * shape.block + shape.head)
        flops += rows * shape.layers * attention(shape, first=context, last=context)
        numbers = shape.layers * shape.block + shape.head + _cached(shape, rows, context)
        steps.append(Work(flops, shape.number_bytes * numbers))
    return Phase(tuple(steps) * passes)


def scoring(shape: Shape, *, rows: int, tokens: int, passes: int = 1) -> Phase:
    """The reward model: one number at the last token of each of `rows` sequences a pass."""
    flops = blocks(shape, shape.layers, rows=rows, tokens=tokens, read=1) + rows * 2 * shape.hidden
    return Phase((Work(flops, shape.number_bytes * shape.layers * shape.block),) * passes)


def experience(shape: Shape, *, rows: int, prompt: int, response: int, passes: int = 1, trunk: bool = False) -> Phase:
    """The top blocks of policy and reference, their LM heads and the value head at R positions.

    The last response token goes through none of them: nothing is read after it. The trunk's states are those that
    sampling has computed; trunk says that they have to be computed here, as where another engine has sampled.
    """
    tokens, below = prompt + response - 1, shape.layers - shape.unfrozen if trunk else 0
    flops = blocks(shape, below, rows=rows, tokens=tokens)
    flops += 2 * blocks(shape, shape.unfrozen, rows=rows, tokens=tokens, read=response)
    flops += rows * response * 2 * (2 * shape.head + shape.value_head)
    numbers = (below + 2 * shape.unfrozen) * shape.block + 2 * shape.head + shape.value_head
    return Phase((Work(flops, shape.number_bytes * numbers),) * passes)


def training(shape: Shape, *, rows: int, prompt: int, response: int, steps: int) -> Phase:
    """So many optimiser steps of `rows` rollouts each: top blocks and heads, forward and backward, and AdamW.

    The backward pass costs twice the forward one, gradients of inputs and of weights, but for what `_unwanted` counts.
    Weights are read forwards and backwards, their gradients written and, with
    AdamW's moments, passed over once; all in float32. The updates cannot begin before the last gradient, so they are a
    pass of their own.
    """
    tokens = prompt + response - 1
    forward = blocks(shape, shape.unfrozen, rows=rows, tokens=tokens, read=response)
    forward += rows * response * 2 * (shape.head + shape.value_head)
    trained = shape.unfrozen * shape.block + shape.head + shape.value_head
    flops = 3 * forward - _unwanted(shape, rows=rows, tokens=tokens, read=response)
    step = (Work(flops, 4 * 3 * trained), Work(bytes=4 * ADAMW_PASSES * trained))
    return Phase(step * steps)


def _unwanted(shape: Shape, *, rows: int, tokens: int, read: int) -> int:
    """Gradients of what the first trained block's norm gives, which nothing below wants when that is frozen.

    The norm's own weights get theirs through the gradients of the layers that read it: query, key and value, and the
    MLP's first, 7 H² numbers. Of the last block only key and value are of all tokens.
    """
    if shape.unfrozen == shape.layers:
        return 0
    every, few = (7, 0) if shape.unfrozen > 1 else (2, 5)
    return 2 * rows * shape.hidden**2 * (every * tokens + few * read)


def together(phases: Iterable[Phase]) -> Phase:
    """Phases one after another."""
    return Phase(tuple(one for phase in phases for one in phase.passes))


def _cached(shape: Shape, rows: int, tokens: int) -> int:
    """Numbers of the keys and values of `rows` sequences in all layers."""
    return 2 * shape.layers * shape.hidden * rows * tokens
