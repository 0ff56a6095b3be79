"""The losses of the reward model and of PPO, and the log-probabilities they are built from.

Shapes: B batch, T token, R response token, V vocabulary. Masks are True where an entry counts.
SFT needs nothing here: its loss is the negative of `vocabulary.choice_logprobs`. The functions of log-probabilities
here are the plain ones, which it is held against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor


def token_logprobs(logits_BRV: Tensor, tokens_BR: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature), in float32.

    The full softmax: no top-k, no top-p.
    """
    scaled_BRV = logits_BRV.float() / temperature
    chosen_BR = scaled_BRV.gather(-1, tokens_BR.unsqueeze(-1)).squeeze(-1)
    return chosen_BR - scaled_BRV.logsumexp(-1)


def pairwise_last_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Bradley-Terry loss, mean of -log sigmoid(chosen - rejected), on one score a summary.

    Source: Stiennon et al. 2020, section 3.4.
    """
    return -F.logsigmoid(chosen_B.float() - rejected_B.float()).mean()


def pairwise_divergent_loss(
    chosen_scores_BT: Tensor,
    rejected_scores_BT: Tensor,
    chosen_ids_BT: Tensor,
    rejected_ids_BT: Tensor,
    chosen_mask_BT: Tensor,
    rejected_mask_BT: Tensor,
) -> Tensor:
    """Bradley-Terry loss at every position from the first difference to the longer one's end.

    Averaged over the positions of a pair, then over the pairs. Past the shorter one's end its scores
    at padding take part. Rows are padded on the right to one width.
    Raises ValueError for a pair of equal rows, and for rows padded on the left.
    Source: CarperAI/trlx, examples/summarize_rlhf/reward_model/reward_model.py, GPTRewardModel.forward.
    """
    chosen_mask_BT, rejected_mask_BT = chosen_mask_BT.bool(), rejected_mask_BT.bool()
    if not (chosen_mask_BT[:, 0].all() and rejected_mask_BT[:, 0].all()):
        raise ValueError("the divergent loss compares rows column by column: pad them on the right")
    # Padding may reuse a real token's id (EOS), so the masks speak too.
    differs_BT = (chosen_ids_BT != rejected_ids_BT) | (chosen_mask_BT != rejected_mask_BT)
    differs_BT = differs_BT & (chosen_mask_BT | rejected_mask_BT)
    if not differs_BT.any(-1).all():
        row = int((~differs_BT.any(-1)).nonzero()[0])
        raise ValueError(f"chosen and rejected of pair {row} are the same tokens; drop such comparisons")
    counts_BT = (differs_BT.cumsum(-1) > 0) & (chosen_mask_BT | rejected_mask_BT)
    losses_BT = -F.logsigmoid(chosen_scores_BT.float() - rejected_scores_BT.float())
    return ((losses_BT * counts_BT).sum(-1) / counts_BT.sum(-1)).mean()


def policy_loss(
    logprobs_BR: Tensor, old_logprobs_BR: Tensor, advantages_BR: Tensor, mask_BR: Tensor, *, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, averaged over the counted tokens, and its statistics.

    Statistics, over the counted tokens: `ratio`, `clip_fraction` (share where the clipped term won) and
    `approx_kl` (k3 estimate of KL(old || new), nats a token).
    Source: Schulman et al. 2017, equation 7; CarperAI/trlx, trlx/models/modeling_ppo.py, PPOConfig.loss.
    """
    # where, not a product: a masked entry may hold anything, even inf.
    log_ratio_BR = torch.where(mask_BR.bool(), logprobs_BR - old_logprobs_BR, 0.0)
    ratio_BR = log_ratio_BR.exp()
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1.0 - clip, 1.0 + clip)
    loss = _masked_mean(torch.maximum(plain_BR, clipped_BR), mask_BR)
    with torch.no_grad():
        stats = {
            "ratio": _masked_mean(ratio_BR, mask_BR),
            "clip_fraction": _masked_mean((clipped_BR > plain_BR).float(), mask_BR),
            "approx_kl": _masked_mean(ratio_BR - 1.0 - log_ratio_BR, mask_BR),
        }
    return loss, stats


def value_loss(
    values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor, *, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the values, held near their old values, over the counted tokens.

    Statistics: `clip_fraction` (share where the clipped term won) and `error` (unclipped mean square).
    Source: CarperAI/trlx, trlx/models/modeling_ppo.py, PPOConfig.loss; Huang et al. 2022, detail 9.
    """
    near_BR = values_BR.clamp(old_values_BR - clip, old_values_BR + clip)
    plain_BR = (values_BR - returns_BR).square()
    clipped_BR = (near_BR - returns_BR).square()
    loss = 0.5 * _masked_mean(torch.maximum(plain_BR, clipped_BR), mask_BR)
    with torch.no_grad():
        stats = {
            "clip_fraction": _masked_mean((clipped_BR > plain_BR).float(), mask_BR),
            "error": _masked_mean(plain_BR, mask_BR),
        }
    return loss, stats


def _masked_mean(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    mask_BR = mask_BR.bool()
    return torch.where(mask_BR, values_BR, 0.0).sum() / mask_BR.sum()
