"""How likely a policy finds given responses.

Shapes: B batch, R response columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.losses import token_logprobs
from rlhf.models import position_ids
from rlhf.rollout import join


@torch.no_grad()
def response_logprobs(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    pad_id: int,
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
        batch = join(
            [prompts[index] for index in chunk],
            [torch.tensor(responses[index]) for index in chunk],
            pad_id=pad_id,
            device=policy.device,
        )
        response_BR = batch.ids_BT[:, batch.response_start :]
        logits_BRV = policy(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT.long(),
            position_ids=position_ids(batch.mask_BT),
            # The last prompt token predicts the first of the response; the last response token predicts nothing.
            logits_to_keep=response_BR.shape[1] + 1,
            use_cache=False,
        ).logits[:, :-1]
        logprobs_BR = token_logprobs(logits_BRV, response_BR, temperature=temperature).cpu()
        for row, index in enumerate(chunk):
            logprobs[index] = logprobs_BR[row, : len(responses[index])]
        if on_progress is not None:
            on_progress(start + len(chunk))
    return logprobs
