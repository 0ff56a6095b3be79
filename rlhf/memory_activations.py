"""What passes through a model need beside its weights, in bytes.

Derived from what autograd keeps for each operation of a block, and from what is alive at once inside one;
docs/memory.md holds the derivation, tests/benchmarks/plan.py measures it. GPT-J runs packed, in our own loop
(rlhf.gptj); other families run padded, through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.model_shape import ELEMENTS_KEPT, ModelShape

COLUMNS_AT_ONCE = 64
"""A padded key/value cache grows in such steps (rlhf.kv_cache)."""
CPU_BATCH_TOKENS = 1024
"""A CPU scores no more at a time (rlhf.scoring)."""
CPU_CHUNK, ACCELERATOR_CHUNK = 2**18, 2**23
"""Numbers of a chunk of logits on its way through the softmax (rlhf.vocabulary)."""
STEPS_WORTH_PACKING, MOST_PACKED_BYTES = 16, 2**29
"""When a CPU writes with weights laid out once more (rlhf.block_linears)."""


@dataclass(frozen=True)
class Numerics:
    """In what a pass computes: width in bytes of a product's numbers, and whether autocast makes it so."""

    width: int
    autocast: bool
    device: str

    @property
    def norm_width(self) -> int:
        """Of what a norm gives: float32 under autocast."""
        return 4 if self.autocast else self.width

    @property
    def raises(self) -> bool:
        """Whether powers are float32: autocast on CUDA computes them so, on the CPU it does not."""
        return self.autocast and self.device == "cuda"

    @property
    def chunk(self) -> int:
        """Numbers of a chunk of logits."""
        return ACCELERATOR_CHUNK if self.device == "cuda" else CPU_CHUNK


def numerics(precision: str, *, autocast: bool, device: str) -> Numerics:
    """Of a network whose trained weights are float32 (autocast), or whose weights are all in `precision`."""
    width = 4 if precision == "float32" else 2
    return Numerics(width, autocast and width < 4, device)


@dataclass(frozen=True)
class Batch:
    """What goes through a model at once: rows of so many tokens each, side by side in the attention.

    kept: tokens of a row whose final state is read. shared: a row holds several sequences that begin alike, so that
    the attention needs a mask.
    """

    rows: int
    tokens: int
    kept: int
    shared: bool = False

    @property
    def all_tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.tokens

    @property
    def all_kept(self) -> int:
        """Of all rows."""
        return self.rows * self.kept


def kept_by_block(
    shape: ModelShape, form: Numerics, batch: Batch, *, adapted: tuple[str, ...] | None = None, last: bool = False
) -> int:
    """What one block leaves for its backward pass.

    adapted: names of the layers with adapters where all else is frozen; a frozen layer keeps no input. last: the last
    block of a packed pass computes keys and values of all tokens, everything else of the kept ones.
    """
    every = batch.all_tokens
    read = batch.all_kept if last and shape.packed else every
    kept = shape.residuals * shape.hidden * 4 * every
    kept += _inputs_kept(shape, form, adapted, every=every, read=read, picked=last and shape.packed) * form.width
    queries = shape.hidden if shape.packed else 0
    kept += (every * (shape.attention_kept - queries) + read * queries) * form.width + read * 4 * shape.heads
    if batch.shared or not shape.packed or last:  # a mask, turned into numbers for each block
        kept += read * batch.tokens * form.width
    return kept + read * _activation_kept(shape, form) * shape.ffn


def _inputs_kept(
    shape: ModelShape, form: Numerics, adapted: tuple[str, ...] | None, *, every: int, read: int, picked: bool
) -> int:
    """Elements that linear layers keep of what they read, the attention's output included."""
    by_source: dict[tuple[str, int], list[int]] = {}
    for linear in shape.linears:
        # The attention keeps its own output, whether the layer that reads it does or not.
        if adapted is None or linear.name in adapted or linear.source == "context":
            tokens = every if not picked or linear.name in ("k_proj", "v_proj") else read
            by_source.setdefault((linear.source, tokens), []).append(linear.inputs)
    # Autocast copies a norm's float32 output for each layer that reads it; else they keep the same tensor.
    return sum(tokens * (sum(sizes) if form.autocast else max(sizes)) for (_, tokens), sizes in by_source.items())


def _activation_kept(shape: ModelShape, form: Numerics) -> int:
    elements = ELEMENTS_KEPT.get(shape.activation, 4)
    if shape.activation == "gelu_new" and form.raises:
        return 3 * 4 + form.width  # the cube's input, tanh and 1 + tanh in float32, half the input as it is
    return elements * form.width


def forward_work(shape: ModelShape, form: Numerics, batch: Batch) -> int:
    """The most that is alive at once inside one block that leaves nothing behind, its input included."""
    hidden, width = shape.hidden, form.width
    before = hidden * (4 if form.autocast else width) + hidden * form.norm_width
    if shape.packed:  # queries, keys, values, what the attention gives, that once more projected, and the wide part
        return batch.all_tokens * (before + (5 * hidden + 2 * shape.ffn) * width) + _mask(shape, form, batch)
    attention = (shape.attention_kept + 2 * hidden) * width
    if shape.activation == "gelu_new":
        mlp = shape.ffn * (2 * width + 8 if form.raises else 4 * width)
    else:
        mlp = shape.ffn * 3 * width
    return batch.all_tokens * (before + max(attention, hidden * width + mlp)) + _mask(shape, form, batch)


def _mask(shape: ModelShape, form: Numerics, batch: Batch) -> int:
    """The attention's mask as numbers, while one block computes."""
    return batch.all_tokens * batch.tokens * form.width * (batch.shared and shape.packed)


def backward_work(shape: ModelShape, form: Numerics, batch: Batch) -> int:
    """The most that is alive at once inside one block's backward pass, beside all that the forward pass kept.

    The feed-forward part comes first; what it kept is gone when attention needs room.
    """
    if shape.activation == "gelu_new":
        wide = 3 * (4 if form.raises else form.width)
    else:  # the wide gradients on both sides of the activation, less its output, which is gone by then
        wide = form.width * (2 if shape.activation == "silu" else 1)
    return batch.all_tokens * (2 * 4 * shape.hidden + wide * shape.ffn)


def around_blocks(shape: ModelShape, batch: Batch) -> int:
    """What is there beside the blocks: the mask and the final norm's input and output."""
    if not shape.packed:
        return batch.all_tokens * (4 * batch.tokens + 2 * 4 * shape.hidden)
    mask = batch.all_kept * batch.tokens + batch.all_tokens * batch.tokens * batch.shared
    return mask + batch.all_kept * 2 * 4 * shape.hidden


def block_inputs(shape: ModelShape, batch: Batch) -> int:
    """With gradient checkpointing, all that a block leaves: its input in float32."""
    return batch.all_tokens * 4 * shape.hidden


def language_loss(shape: ModelShape, form: Numerics, *, positions: int, head_trained: bool) -> int:
    """Logits at so many positions, at the most: with their softmax's chunks, with their gradient, or that gradient
    with the LM head's, which autocast has in 16 bits first."""
    numbers = positions * shape.vocab
    chunk = 4 * min(form.chunk, numbers)
    gradient = form.width * numbers + chunk * (form.width < 4)
    head = (4 + form.width * form.autocast) * shape.vocab * shape.hidden if head_trained else 0
    return form.width * numbers + max(2 * chunk, gradient, head)


def evaluated_logits(shape: ModelShape, form: Numerics, *, positions: int) -> int:
    """Logits that need no gradient, and the chunks of their softmax."""
    numbers = positions * shape.vocab
    return form.width * numbers + 8 * min(form.chunk, numbers)


def passing(shape: ModelShape, form: Numerics, batch: Batch) -> int:
    """A pass without gradients."""
    return forward_work(shape, form, batch) + around_blocks(shape, batch)


def cache(shape: ModelShape, form: Numerics, *, rows: int, tokens: int) -> int:
    """Keys and values of every block."""
    columns = tokens if shape.packed else -(-tokens // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
    return 2 * shape.layers * rows * columns * shape.kv_size * form.width


def generation_work(shape: ModelShape, form: Numerics, *, rows: int, prompt: int) -> int:
    """Beside the cache: one block's pass over the prompts, or choosing a token from float64 probabilities."""
    prefill = forward_work(shape, form, Batch(rows, prompt, kept=1))
    if not shape.packed:
        prefill += rows * prompt * (4 * prompt + 8 * shape.kv_size)
    return max(prefill, rows * shape.vocab * 24)


def written_weights(shape: ModelShape, form: Numerics, *, response: int) -> int:
    """A CPU lays out the weights once more to write with them, where that pays (rlhf.block_linears)."""
    if form.device == "cuda" or not shape.packed or form.width < 4 or response < STEPS_WORTH_PACKING:
        return 0
    block = sum(linear.inputs * linear.outputs for linear in shape.linears)
    copies = 4 * (shape.layers * block + shape.vocab * shape.hidden)
    return copies if copies <= MOST_PACKED_BYTES else 0


def scoring_work(shape: ModelShape, form: Numerics, *, batch_tokens: int, tokens: int) -> int:
    """A pass of the reward model over a batch of at most batch_tokens, or over one sequence of so many tokens."""
    if form.device != "cuda":
        batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS)
    if shape.packed:
        return passing(shape, form, Batch(1, max(batch_tokens, tokens), kept=1))
    return passing(shape, form, Batch(max(batch_tokens // tokens, 1), tokens, kept=tokens))


def autocast_copies(numbers: int, form: Numerics) -> int:
    """Matrices of float32 that are trained, once more in 16 bits: autocast keeps the copies until its end."""
    return form.width * numbers if form.autocast else 0
