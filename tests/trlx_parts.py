"""What the tests of PPO by trlX share: a configuration, a prompt, and as much of a trainer as we look at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import Config
from rlhf.environment import EnvironmentRow
from tests.fakes import tiny_policy
from tests.tiny_run import byte_tokenizer, tiny_config

TOKENIZER = byte_tokenizer()


def config(**ppo: Any) -> Config:
    """Two optimiser steps an iteration."""
    settings = {
        "engine": "trlx",
        "iterations": 3,
        "unfrozen_layers": 1,
        "rollouts_per_iteration": 4,
        "rollout_chunk": 2,
        "inner_epochs": 1,
        "minibatch_size": 2,
        "micro_batch_size": 2,
        "eval_every_iterations": 2,
        "eval_posts": 4,
        "save_every_iterations": 2,
        "optimizer": {"learning_rate": 1e-3, "final_learning_rate": 0.0, "warmup_steps": 0, "weight_decay": 0.01},
    } | ppo
    lengths = {"max_prompt_tokens": 96, "max_response_tokens": 8}
    return Config.model_validate(tiny_config().model_dump() | {"ppo": settings, "prompt": lengths})


class FixedScorer:
    """Scores a sequence by its length."""

    def score(self, sequences: list[list[int]]) -> Tensor:
        return torch.tensor([len(sequence) / 100 for sequence in sequences])


def row(text: str = "SUBREDDIT: r/pets", reference: float = 0.05) -> EnvironmentRow:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return EnvironmentRow(text, ids, 0, reference)


class FakeTrainer:
    """As much of a trlX trainer as the export looks at."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = SimpleNamespace(base_model=tiny_policy(seed=seed), v_head=nn.Linear(32, 1))
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        parameters = [*self.model.base_model.parameters(), *self.model.v_head.parameters()]
        self.opt = torch.optim.AdamW(parameters, lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, T_max=10, eta_min=0.0)
        self.kl_ctl = SimpleNamespace(value=0.1)
        self.running_moments = SimpleNamespace(mean=0, std=1, var=1, count=1e-24)

    def step(self) -> None:
        ids = torch.arange(12).view(2, 6)
        output = self.model.base_model(ids, output_hidden_states=True, labels=ids)
        (output.loss + self.model.v_head(output.hidden_states[-1]).square().mean()).backward()
        self.opt.step()
        self.opt.zero_grad()
        self.scheduler.step()
