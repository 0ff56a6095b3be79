"""Log-probabilities over the vocabulary, a few rows of logits at a time.

Logits are the widest thing a model computes: a float32 copy of them, its log-softmax and their gradients would each
be read from main memory and written back. Here a chunk of rows is copied, worked on in place while it lies in the
cache, and forgotten; the gradient is written chunk by chunk too.

Shapes: K tokens chosen, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK = 2**18
"""Numbers of a chunk on a CPU: a MiB of float32, twice, which stays in the cache."""
ACCELERATOR_CHUNK = 2**23
"""On anything else: 32 MiB a buffer, enough that the launches of a chunk do not count, about what its cache holds."""


def choice_logprobs(logits_KV: Tensor, tokens_K: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under softmax(logits / temperature), and that distribution's entropy in nats.

    logprobs_K has gradients into the logits, once; entropy_K has none. Both are float32, and float64 for logits of
    float64. The full softmax: no top-k, no top-p. A logit of -inf rules its token out; where a row holds inf or NaN,
    both results are NaN. Equal to `losses.token_logprobs` to rounding.
    """
    logprobs_K, entropy_K = _ChoiceLogprobs.apply(logits_KV, tokens_K, temperature)
    return logprobs_K, entropy_K


class _ChoiceLogprobs(torch.autograd.Function):
    """See choice_logprobs. Keeps the logits and one number a row for the gradient, onehot - softmax."""

    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, tokens_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows, width = logits_KV.shape
        precision = torch.promote_types(logits_KV.dtype, torch.float32)
        logprobs_K, entropy_K, normaliser_K = logits_KV.new_empty(3, rows, dtype=precision).unbind()
        lowest = torch.finfo(precision).min
        size = _chunk_rows(logits_KV)
        scaled, powers = logits_KV.new_empty(2, min(size, rows), width, dtype=precision).unbind()
        for chunk in _chunks(rows, size):
            # Cut, so that the last chunk, which may be smaller, uses the same memory.
            count = chunk.stop - chunk.start
            scaled_CV, powers_CV = scaled[:count], powers[:count]
            scaled_CV.copy_(logits_KV[chunk])
            if temperature != 1.0:
                scaled_CV.div_(temperature)
            most_C1 = scaled_CV.amax(dim=1, keepdim=True)
            scaled_CV.sub_(most_C1)
            torch.exp(scaled_CV, out=powers_CV)
            sum_C = powers_CV.sum(dim=1)
            log_sum_C = sum_C.log()
            chosen_C = scaled_CV.gather(1, tokens_K[chunk].unsqueeze(1)).squeeze(1)
            torch.sub(chosen_C, log_sum_C, out=logprobs_K[chunk])
            torch.add(log_sum_C, most_C1.squeeze(1), out=normaliser_K[chunk])
            # A token that is ruled out adds 0 times its logit, which must not be 0 times -inf.
            weighted_C = scaled_CV.clamp_(min=lowest).mul_(powers_CV).sum(dim=1)
            torch.sub(log_sum_C, weighted_C.div_(sum_C), out=entropy_K[chunk])
        ctx.temperature = temperature
        ctx.save_for_backward(logits_KV, tokens_K, normaliser_K)
        ctx.mark_non_differentiable(entropy_K)
        return logprobs_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights_K: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits_KV, tokens_K, normaliser_K = ctx.saved_tensors
        rows, width = logits_KV.shape
        weights_K1 = (weights_K / ctx.temperature).unsqueeze(1)
        grad_KV = torch.empty_like(logits_KV)
        in_place = logits_KV.dtype == normaliser_K.dtype
        size = _chunk_rows(logits_KV)
        # Without a wider precision to work in, the gradient is worked out where it will stand.
        buffer = grad_KV if in_place else normaliser_K.new_empty(min(size, rows), width)
        for chunk in _chunks(rows, size):
            work_CV = grad_KV[chunk] if in_place else buffer[: chunk.stop - chunk.start]
            work_CV.copy_(logits_KV[chunk])
            if ctx.temperature != 1.0:
                work_CV.div_(ctx.temperature)
            work_CV.sub_(normaliser_K[chunk].unsqueeze(1)).exp_().mul_(-weights_K1[chunk])
            work_CV.scatter_add_(1, tokens_K[chunk].unsqueeze(1), weights_K1[chunk])
            if not in_place:
                grad_KV[chunk] = work_CV
        return grad_KV, None, None


def _chunk_rows(logits_KV: Tensor) -> int:
    numbers = CPU_CHUNK if logits_KV.device.type == "cpu" else ACCELERATOR_CHUNK
    return max(1, numbers // logits_KV.shape[1])


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
