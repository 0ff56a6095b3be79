"""What passes through a model need beside its weights, in bytes.

Derived from what autograd keeps for each operation of a block as transformers writes it, and from what is alive at
once inside one; docs/memory.md holds the derivation, tests/benchmarks/plan.py measures it.

All functions speak of `rows` sequences of `tokens` tokens, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.model_shape import ELEMENTS_KEPT, ModelShape

COLUMNS_AT_ONCE = 64
"""The key/value cache grows in such steps (rlhf.kv_cache)."""


@dataclass(frozen=True)
class Numerics:
    """In what a pass computes: width in bytes of a product's numbers, and whether autocast makes it so.

    raises: autocast on CUDA computes powers in float32, on the CPU it does not.
    """

    width: int
    autocast: bool
    raises: bool

    @property
    def norm_width(self) -> int:
        """Of what a norm gives: float32 under autocast."""
        return 4 if self.autocast else self.width

    @property
    def eager_scores(self) -> int:
        """Bytes an attention weight: float32, and under autocast or in half precision a copy in 16 bits."""
        return 4 + (self.width if self.width < 4 else 0)


def numerics(precision: str, *, autocast: bool, device: str) -> Numerics:
    """Of a network whose trained weights are float32 (autocast), or whose weights are all in `precision`."""
    width = 4 if precision == "float32" else 2
    autocast = autocast and width < 4
    return Numerics(width, autocast, raises=autocast and device == "cuda")


def kept_by_block(
    shape: ModelShape, form: Numerics, *, rows: int, tokens: int, adapted: tuple[str, ...] | None = None
) -> int:
    """What one block leaves for its backward pass.

    adapted: names of the layers with adapters where all else is frozen; a frozen layer keeps no input.
    """
    by_source: dict[str, list[int]] = {}
    for linear in shape.linears:
        if adapted is None or linear.name in adapted:
            by_source.setdefault(linear.source, []).append(linear.inputs)
    # Autocast copies a norm's float32 output for each layer that reads it; else they keep the same tensor.
    inputs = sum(sum(sizes) if form.autocast else max(sizes) for sizes in by_source.values())
    token = shape.residuals * shape.hidden * 4 + (inputs + shape.attention_kept) * form.width
    token += _activation_kept(shape, form) * shape.ffn
    token += shape.heads * tokens * form.eager_scores if shape.eager else 4 * shape.heads + tokens * form.width
    return rows * tokens * token


def _activation_kept(shape: ModelShape, form: Numerics) -> int:
    elements = ELEMENTS_KEPT.get(shape.activation, 4)
    if shape.activation == "gelu_new" and form.raises:
        return 3 * 4 + form.width  # the cube's input, tanh and 1 + tanh in float32, half the input as it is
    return elements * form.width


def forward_work(shape: ModelShape, form: Numerics, *, rows: int, tokens: int) -> int:
    """The most that is alive at once inside one block, of what it does not leave behind."""
    hidden, width = shape.hidden, form.width
    before = hidden * (4 if form.autocast else width) + hidden * form.norm_width
    if shape.eager:
        raised = 2 * hidden * 4 if width < 4 else 0  # queries and keys in float32
        attention = 3 * hidden * width + raised + 2 * shape.heads * tokens * 4
    else:
        attention = (shape.attention_kept + 2 * hidden) * width
    if shape.activation == "gelu_new":
        mlp = shape.ffn * (2 * width + 8 if form.raises else 4 * width)
    else:
        mlp = shape.ffn * 3 * width
    return rows * tokens * (before + max(attention, hidden * width + mlp))


def backward_work(shape: ModelShape, form: Numerics, *, rows: int, tokens: int) -> int:
    """The most that is alive at once inside one block's backward pass, beside all that the forward pass kept.

    The feed-forward part comes first; what it kept is gone when attention needs room.
    """
    mlp = shape.ffn * (3 * 4 if form.raises else 3 * form.width)
    attention = 2 * shape.heads * tokens * 4 if shape.eager else 3 * shape.hidden * form.width
    attention -= shape.ffn * (_activation_kept(shape, form) + form.width)
    return rows * tokens * (2 * 4 * shape.hidden + max(mlp, attention))


def around_blocks(shape: ModelShape, *, rows: int, tokens: int) -> int:
    """What is there beside the blocks: the mask [rows, 1, tokens, tokens] and the final norm's input and output."""
    return rows * tokens * (4 * tokens + 2 * 4 * shape.hidden)


def block_inputs(shape: ModelShape, *, rows: int, tokens: int) -> int:
    """With gradient checkpointing, all that a block leaves: its input in float32."""
    return rows * tokens * 4 * shape.hidden


def sft_loss(shape: ModelShape, *, rows: int, positions: int) -> int:
    """Logits at the positions that count, at the most: log-softmax, its gradient, and the gradient of the loss."""
    return 12 * rows * positions * shape.vocab


def ppo_loss(shape: ModelShape, form: Numerics, *, rows: int, response: int) -> int:
    """Logits at the response: as they come, scaled, and four of float32 for the entropy."""
    return (form.width + 4 + 4 * 4) * rows * response * shape.vocab


def cache(shape: ModelShape, form: Numerics, *, rows: int, tokens: int) -> int:
    """Keys and values of every block."""
    columns = -(-tokens // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
    return 2 * shape.layers * rows * columns * shape.kv_size * form.width


def generation_work(shape: ModelShape, form: Numerics, *, rows: int, prompt: int, tokens: int) -> int:
    """Beside the cache: one block's pass over the prompts, or choosing a token from float64 probabilities."""
    prefill = forward_work(shape, form, rows=rows, tokens=prompt) + rows * prompt * (4 * prompt + 8 * shape.kv_size)
    raised = rows * tokens * shape.kv_size * (8 if shape.eager else 0)  # one block's keys, in float32
    return max(prefill, rows * shape.vocab * 24 + raised)


def scoring_work(shape: ModelShape, form: Numerics, *, batch_tokens: int, tokens: int) -> int:
    """A pass of the reward model over a batch of at most batch_tokens."""
    rows = max(batch_tokens // tokens, 1)
    return forward_work(shape, form, rows=rows, tokens=tokens) + around_blocks(shape, rows=rows, tokens=tokens)


def autocast_copies(numbers: int, form: Numerics) -> int:
    """Matrices of float32 that are trained, once more in 16 bits: autocast keeps the copies until its end."""
    return form.width * numbers if form.autocast else 0
