"""trlX's PPO trainer with our hooks: where to stop, what to measure, and nothing saved by trlX itself.

Importing this needs trlX, mended (`rlhf.trlx.compat.mended`). trlX finds its trainers by name, among subclasses.
Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer

from rlhf.advantages import k3
from rlhf.errors import RlhfError
from rlhf.losses import token_logprobs
from rlhf.models import position_ids
from rlhf.trlx.export import policy_of
from rlhf.trlx.reward import Scored
from rlhf.trlx.settings import TRAINER

if TYPE_CHECKING:
    from rlhf.trlx.ledger import Ledger

MAX_FIRST_KL = 1e-4


@register_trainer(TRAINER)
class RlhfPpoTrainer(AcceleratePPOTrainer):
    """What differs from trlX's trainer, method by method; the algorithm is trlX's."""

    def __init__(self, config: Any, ledger: Ledger, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.ledger = ledger
        self.accelerator.trackers.append(ledger)
        ledger.begin(self)

    def decode(
        self, prompts: Any, samples: Any, prompt_sizes: Any = None, append_eos_token: bool = True
    ) -> tuple[list[str], list[str], list[str]]:
        """As trlX, but with EOS in evaluations, too: our reward model reads its score at EOS."""
        texts: tuple[list[str], list[str], list[str]] = super().decode(
            prompts, samples, prompt_sizes, append_eos_token=True
        )
        return texts

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """As trlX; between chunks of rollouts a stop is heeded."""
        self.ledger.heed()
        tokens: Tensor = super().generate(*args, **kwargs)
        return tokens

    def generate_eval(self, *args: Any, **kwargs: Any) -> Tensor:
        """As trlX; between chunks of an evaluation a stop is heeded."""
        self.ledger.heed()
        tokens: Tensor = super().generate_eval(*args, **kwargs)
        return tokens

    def make_experience(self, num_rollouts: int = 1024, iter_count: int = 0) -> None:
        """As trlX. Raises RlhfError when the first rollouts' KL is not 0: then the reference is not the SFT policy."""
        super().make_experience(num_rollouts, iter_count)
        if self.ledger.iteration == 0 and iter_count == 0 and not abs(self.mean_kl) <= MAX_FIRST_KL:
            raise RlhfError(
                f"trlX's reference is not the SFT policy: the KL before training is {self.mean_kl:.3g} nats a summary "
                f"and must be 0; transformers' {type(policy_of(self)).__name__} has changed under trlX, so use "
                "ppo.engine: builtin"
            )

    def evaluate(self) -> dict[str, Any]:
        """As trlX, and our numbers of the same summaries."""
        started = time.monotonic()
        before = self.ledger.reward_function.take()
        stats: dict[str, Any] = super().evaluate()
        held_out = self.ledger.reward_function.take()
        self.ledger.reward_function.scored = before
        values = self.ledger.held_out(held_out, self.response_kl(held_out))
        self.ledger.not_training(time.monotonic() - started)
        return stats | values

    def post_epoch_callback(self) -> None:
        """The end of an iteration, and the next one's rollouts; not called after the last."""
        self.ledger.end_iteration()
        super().post_epoch_callback()

    def save_pretrained(self, directory: str | None = None, **kwargs: Any) -> None:
        """Nothing: what trlX would save, AutoModel takes for random weights; the ledger saves."""

    @torch.no_grad()
    def response_kl(self, scored: Sequence[Scored]) -> float:
        """Mean over summaries of k3 of KL(policy || reference), in nats, as our own engine measures it."""
        total, chunk = 0.0, self.config.method.chunk_size
        for start in range(0, len(scored), chunk):
            self.ledger.heed()
            part = scored[start : start + chunk]
            rows = [torch.tensor(one.row.prompt_ids + one.response_ids) for one in part]
            lengths_B = torch.tensor([len(row) for row in rows])
            prompts_B = torch.tensor([len(one.row.prompt_ids) for one in part])
            ids_BT = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            columns_T = torch.arange(ids_BT.shape[1])
            mask_BT = columns_T < lengths_B[:, None]
            response_BT = mask_BT & (columns_T >= prompts_B[:, None])
            policy_BT, reference_BT = self._logprobs(ids_BT, mask_BT)
            total += float((k3(reference_BT, policy_BT).cpu() * response_BT[:, 1:]).sum())
        return total / max(len(scored), 1)

    def _logprobs(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Of policy and reference: each token's log-probability after those before it, from the second token on."""
        device = self.accelerator.device
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        inputs = {
            "attention_mask": mask_BT.long(),
            "position_ids": position_ids(mask_BT),
            "return_dict": True,
        }
        model = self.accelerator.unwrap_model(self.model)
        policy = token_logprobs(model(ids_BT, **inputs).logits[:, :-1], ids_BT[:, 1:])
        reference = token_logprobs(model.forward_hydra(ids_BT, **inputs).logits[:, :-1], ids_BT[:, 1:])
        return policy, reference
