"""The shape of a causal language model, and the parameters that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

Numbers = int
"""A count of parameters or of elements; bytes are named as such."""

ELEMENTS_KEPT = {"gelu_new": 4, "gelu": 1, "gelu_pytorch_tanh": 1, "relu": 1, "silu": 3}
"""Elements that an activation keeps for its backward pass, for each of its inputs; `silu` with its gate's product."""


@dataclass(frozen=True)
class Linear:
    """A matrix of a block; layers with the same source read the same tensor."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    source: str

    @property
    def numbers(self) -> Numbers:
        """Weight and bias."""
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal blocks.

    residuals: tensors of width `hidden` that a block keeps in float32 for its norms' backward pass. attention_kept:
    elements a token that attention keeps in the precision of computation, without its output. packed: it runs in our
    own loop, without padding (rlhf.gptj), not in transformers'. norm_numbers: parameters of a block's norms.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_size: int
    ffn: int
    vocab: int
    positions: int
    tied: bool
    linears: tuple[Linear, ...]
    norm_numbers: Numbers
    final_norm: Numbers
    position_numbers: Numbers
    head_bias: bool
    activation: str
    residuals: int
    attention_kept: int
    packed: bool
    buffer_numbers: Numbers = 0

    @property
    def matrix_numbers(self) -> Numbers:
        """Of one block, what products of matrices use; autocast copies it."""
        return sum(linear.numbers for linear in self.linears)

    @property
    def block_numbers(self) -> Numbers:
        """Parameters of one block."""
        return self.matrix_numbers + self.norm_numbers

    @property
    def embedding_numbers(self) -> Numbers:
        """Parameters of the embeddings of tokens and positions."""
        return self.vocab * self.hidden + self.position_numbers

    @property
    def head_numbers(self) -> Numbers:
        """Parameters of an LM head that shares nothing."""
        return self.vocab * (self.hidden + self.head_bias)

    @property
    def backbone_numbers(self) -> Numbers:
        """Everything but a head."""
        return self.embedding_numbers + self.layers * self.block_numbers + self.final_norm

    @property
    def policy_numbers(self) -> Numbers:
        """Parameters of the causal LM."""
        own_head = self.vocab * self.head_bias if self.tied else self.head_numbers
        return self.backbone_numbers + own_head

    @property
    def reward_numbers(self) -> Numbers:
        """Parameters of the sequence classifier with one label and no bias."""
        return self.backbone_numbers + self.hidden

    @property
    def largest_numbers(self) -> Numbers:
        """Parameters of the largest tensor."""
        return max(self.vocab * self.hidden, *(linear.inputs * linear.outputs for linear in self.linears))
