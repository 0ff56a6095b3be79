"""How far our engine and trlX are from each other on the same rollouts: for `ppo_iteration`; needs trlX.

Our engine samples and evaluates a chunk of rollouts; trlX's model, with the same weights, evaluates the same tokens.

Shapes: B rollouts, T prompt and response columns, R response columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.environment import load_environment
from rlhf.losses import policy_loss, value_loss
from rlhf.models import backbone, blocks, position_ids
from rlhf.oversight import Oversight
from rlhf.ppo_setup import Learner, build_learner
from rlhf.rollout import Rollout
from rlhf.sequences import left_pad
from rlhf.stages.ppo import sample
from rlhf.stopping import StopSignal
from rlhf.telemetry import Stopwatch
from rlhf.trlx.compat import mended
from rlhf.trlx.export import trlx_copy
from rlhf.trlx.settings import trlx_settings
from rlhf.watchdog import Watchdog
from tests.benchmarks.trlx_example import example_scorer


def differences(config: Config, run_dir: Path, *, max_length: int) -> dict[str, float]:
    """The largest absolute difference of each number that both compute."""
    stage = StageDir(run_dir, "ppo")
    learner = build_learner(config, stage)
    rollouts = sample_chunk(learner, run_dir)
    # Both have learnt nothing yet, so that every value is of the value head as it was made.
    with mended(cpu=True), torch.no_grad():
        settings = trlx_settings(
            config,
            model_dir=trlx_copy(learner.source, stage.room / "copy"),
            work_dir=stage.room,
            layers=len(blocks(backbone(learner.actor.policy))),
        )
        policy, reference, values = trlx_numbers(learner, rollouts, settings)
        ours = {
            "log-probability": torch.stack([one.logprobs_R for one in rollouts]),
            "reference's": torch.stack([one.reference_logprobs_R for one in rollouts]),
            "value": torch.stack([one.values_R for one in rollouts]),
        }
        found = {
            name: float((mine - its).abs().max())
            for (name, mine), its in zip(ours.items(), (policy, reference, values), strict=True)
        }
        found["loss"] = loss_difference(config, ours["log-probability"], ours["value"], settings)
    scorer = example_scorer(run_dir, learner.tokenizer, max_length=max_length)
    sequences = [one.row.prompt_ids + one.response_R.tolist() for one in rollouts]
    scores = scorer.score(sequences) - torch.tensor([one.score for one in rollouts])
    again = [
        scorer.reference_scores[learner.tokenizer.decode(one.row.prompt_ids)] - one.row.reference_score
        for one in rollouts
    ]
    return found | {"score": float(scores.abs().max()), "score of the reference": max(map(abs, again))}


def sample_chunk(learner: Learner, run_dir: Path) -> list[Rollout]:
    """Rollouts of the first prompts, as the stage makes them."""
    rows = load_environment(StageDir(run_dir, "prepare").final(), "train")[: learner.config.ppo.rollout_chunk]
    with Watchdog(learner.config.runtime.hang_after_seconds) as watchdog:
        return sample(learner, rows, Stopwatch(), Oversight(StopSignal(), watchdog))


def trlx_numbers(
    learner: Learner, rollouts: Sequence[Rollout], settings: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """trlX's log-probabilities of the response tokens, its reference's, and its values; all [B, R]."""
    models = importlib.import_module("trlx.models.modeling_ppo")
    modeling = importlib.import_module("trlx.utils.modeling")
    model = models.AutoModelForCausalLMWithHydraValueHead.from_pretrained(
        settings["model"]["model_path"],
        num_layers_unfrozen=learner.config.ppo.unfrozen_layers,
        **settings["model"]["model_extra_configs"],
    ).eval()
    model.v_head.load_state_dict(learner.actor.value_head.layers.state_dict())
    sequences = [one.row.prompt_ids + one.response_R.tolist() for one in rollouts]
    ids_BT, mask_BT = left_pad(sequences, learner.tokenizer.pad_token_id)
    inputs = {"attention_mask": mask_BT.long(), "position_ids": position_ids(mask_BT), "return_dict": True}
    output = model(ids_BT, **inputs)
    hydra = model.forward_hydra(ids_BT, **inputs)
    responses = slice(-len(rollouts[0].response_R), None)
    policy_BR, reference_BR = (
        modeling.logprobs_of_labels(one.logits[:, :-1], ids_BT[:, 1:])[:, responses] for one in (output, hydra)
    )
    return policy_BR, reference_BR, output.value[:, :-1][:, responses]


def loss_difference(config: Config, logprobs_BR: Tensor, values_BR: Tensor, settings: dict[str, Any]) -> float:
    """Of the losses of both on the same made-up changes, which are large enough that clipping takes part."""
    chances = torch.Generator().manual_seed(1)
    changes = [torch.randn(logprobs_BR.shape, generator=chances) * 0.3 for _ in range(4)]
    old_logprobs, old_values = logprobs_BR + changes[0], values_BR + changes[1]
    advantages, returns, mask = changes[2], values_BR + changes[3], torch.ones_like(values_BR)
    configs = importlib.import_module("trlx.data.configs")
    method = configs.TRLConfig.from_dict(settings).method
    its, _ = method.loss(logprobs_BR, values_BR, old_logprobs, old_values, advantages, returns, mask)
    policy, _ = policy_loss(logprobs_BR, old_logprobs, advantages, mask, clip=config.ppo.clip_ratio)
    value, _ = value_loss(values_BR, old_values, returns, mask, clip=config.ppo.clip_value)
    return abs(float(policy + config.ppo.vf_coef * value - its))
