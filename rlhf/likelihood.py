"""How likely a policy finds given responses.

Shapes: R tokens of a response, K tokens of all responses of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.forward import token_logits
from rlhf.packing import pack
from rlhf.vocabulary import choice_logprobs


@torch.no_grad()
def response_logprobs(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Log-probability of each response token under softmax(logits / temperature): float32 [R] each, on the CPU.

    Prompts of like length share a batch; the results are in the order given. on_progress hears after each batch
    how many responses are done.
    """
    logprobs: list[Tensor] = [torch.empty(0)] * len(prompts)
    # The longest first: a batch that does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        # The last prompt token predicts the first of the response; the last response token predicts nothing.
        packed = pack(
            [[*prompts[index], *responses[index][:-1]] for index in chunk],
            keep=[len(responses[index]) for index in chunk],
        ).to(policy.device)
        tokens_K = torch.tensor([token for index in chunk for token in responses[index]], device=policy.device)
        logprobs_K, _ = choice_logprobs(token_logits(policy, packed), tokens_K, temperature=temperature)
        parts = logprobs_K.cpu().split([len(responses[index]) for index in chunk])
        for index, logprobs_R in zip(chunk, parts, strict=True):
            logprobs[index] = logprobs_R
        if on_progress is not None:
            on_progress(start + len(chunk))
    return logprobs
