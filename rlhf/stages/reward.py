"""The reward model: the SFT policy learns which of two summaries people prefer.

Bottom blocks and embeddings stay as SFT left them. Held-out accuracy is reported beside what "the longer one
wins" would give, and with how well the model knows when it is right.

Shapes: B pairs of a batch (2B rows, chosen first), T token, N held-out pairs.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.collate import EncodedPair, PairCollator, token_ids
from rlhf.config import Config, PromptConfig, RewardConfig
from rlhf.data import Comparison, Example, load_comparisons, load_examples
from rlhf.errors import ConfigError, DataError
from rlhf.losses import pairwise_divergent_loss, pairwise_last_loss
from rlhf.models import freeze_bottom, load_reward_model, reward_model_from_policy
from rlhf.preference import Pairs, preference_metrics
from rlhf.prompt import encode_prompt, encode_response
from rlhf.runtime import StopSignal, from_first, prepare_runtime
from rlhf.scoring import Scorer, token_scores
from rlhf.tokenizer import load_tokenizer
from rlhf.trainer import (
    StageTrainer,
    check_stop,
    plan_training,
    publish_model,
    remove_unpublished,
    train_to_end,
    training_arguments,
)
from rlhf.trainer_callbacks import StageCallback, TrainingLog

logger = logging.getLogger(__name__)

SHIFT_POSTS = 2000
"""Training posts whose reference summaries are made to average 0."""


def run(config: Config, run_dir: Path, stop: StopSignal) -> None:
    """Train on `fetch/final/data`'s comparisons, starting from `sft/final`, and publish `reward/final`."""
    device = prepare_runtime(config.runtime, seed=config.seed)
    data = StageDir(run_dir, "fetch").final() / "data"
    policy, stage = StageDir(run_dir, "sft").final(), StageDir(run_dir, "reward")
    remove_unpublished(stage)

    # 1. Comparisons become token ids, once.
    tokenizer = load_tokenizer(policy, key="sft/final")
    train = [pair for _, pair in encode_pairs(tokenizer, load_comparisons(data, "train"), config.prompt)]
    held_out = encode_pairs(tokenizer, load_comparisons(data, "valid"), config.prompt)
    held_out.sort(key=lambda entry: entry[1].length)
    valid = [pair for _, pair in held_out]

    # 2. The policy's weights under a fresh head, or the newest checkpoint of an interrupted run.
    plan = plan_training(config.reward, name="reward", examples=len(train))
    arguments = training_arguments(
        config.reward, stage=stage, plan=plan, runtime=config.runtime, device=device, seed=config.seed
    )
    start = from_first(stage.latest)
    model = load_reward_model(start[1]) if start else reward_model_from_policy(policy, seed=config.seed)
    frozen = freeze_bottom(model, config.reward.frozen_fraction)
    score_every_position(model)
    logger.info("frozen blocks=%d fraction=%g", frozen, config.reward.frozen_fraction)

    # 3. Train and look at the held-out pairs.
    with TrainingLog(
        stage, total_steps=plan.total_steps, resumed_at=start[0] if start else None, runtime=config.runtime
    ) as log:
        report = PreferenceReport([comparison for comparison, _ in held_out], valid)
        trainer = RewardTrainer(
            model=model,
            section=config.reward,
            arguments=arguments,
            collator=PairCollator(pad_id=tokenizer.pad_token_id),
            train=train,
            valid=valid,
            measure=report,
            callback=StageCallback(stage=stage, tokenizer=tokenizer, runtime=config.runtime, log=log, stop=stop),
        )
        train_to_end(trainer, start=start, stop=stop)
        trainer.evaluate()
        check_stop(trainer, stop)

        # 4. Shift the scores so that the references of the training posts average 0, and publish.
        scores = reference_scores(trainer, tokenizer, load_examples(data, "train")[:SHIFT_POSTS], config)
        model.config.score_shift = float(scores.mean())
        metrics = report.details | {
            "reward/score_mean": float(scores.mean()),
            "reward/score_std": float(scores.std()),
        }
        publish_model(
            trainer,
            stage=stage,
            tokenizer=tokenizer,
            metrics=json.dumps(metrics, indent=1),
            keep=config.runtime.keep_checkpoints,
        )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison], prompt: PromptConfig
) -> list[tuple[Comparison, EncodedPair]]:
    """Comparisons with their token ids; those that cannot be told apart or do not fit are left out and counted.

    Raises DataError when none is left.
    """
    encoded = []
    for comparison in comparisons:
        try:
            ids = encode_prompt(tokenizer, comparison.post, max_tokens=prompt.max_prompt_tokens).ids
        except ValueError as error:
            logger.debug("left out post=%s: %s", comparison.post.id, error)
            continue
        chosen = encode_response(tokenizer, comparison.chosen, max_tokens=prompt.max_response_tokens)
        rejected = encode_response(tokenizer, comparison.rejected, max_tokens=prompt.max_response_tokens)
        if chosen != rejected:
            pair = EncodedPair(prompt=token_ids(ids), chosen=token_ids(chosen), rejected=token_ids(rejected))
            encoded.append((comparison, pair))
    if not encoded:
        raise DataError(
            f"none of {len(comparisons)} comparisons fits prompt.max_prompt_tokens={prompt.max_prompt_tokens} and "
            f"differs within prompt.max_response_tokens={prompt.max_response_tokens}; raise them"
        )
    if len(encoded) < len(comparisons):
        left_out = len(comparisons) - len(encoded)
        logger.warning("left out %d of %d pairs: header too long, or equal once cut", left_out, len(comparisons))
    return encoded


class RewardTrainer(StageTrainer):
    """Bradley-Terry on pairs."""

    loss_is_scaled_for_ga = False
    section: RewardConfig

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean loss of the micro-batch's pairs."""
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        scores_BT = model(ids_BT, mask_BT)
        if self.section.loss == "last":
            return pairwise_last_loss(*scores_at_end(scores_BT, mask_BT).chunk(2))
        return pairwise_divergent_loss(*scores_BT.chunk(2), *ids_BT.chunk(2), *mask_BT.chunk(2))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, None]:
        """A row a pair: the raw scores of chosen and rejected."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores_BT = model(inputs["input_ids"], inputs["attention_mask"])
            scores_2B = scores_at_end(scores_BT, inputs["attention_mask"]).float()
        return None, torch.stack(scores_2B.chunk(2), dim=1), None


def score_every_position(model: PreTrainedModel) -> None:
    """Make the model's forward give token_scores.

    The loss needs them, and what wraps a model for training (DDP, DeepSpeed, autocast) sees forward alone.
    """
    model.forward = functools.partial(token_scores, model)


def scores_at_end(scores_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The score at the last counted token of rows padded on the right: scores_B."""
    return scores_BT.gather(1, mask_BT.sum(dim=1, keepdim=True) - 1).squeeze(1)


class PreferenceReport:
    """Turns held-out scores into metrics: plain numbers for the curves, `details` for metrics.json."""

    def __init__(self, comparisons: Sequence[Comparison], pairs: Sequence[EncodedPair]) -> None:
        def known(values: Iterable[float | None]) -> NDArray[np.float64]:
            return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

        self.pairs = Pairs(
            chosen_tokens_N=known(len(pair.chosen) for pair in pairs),
            rejected_tokens_N=known(len(pair.rejected) for pair in pairs),
            sources=[comparison.source for comparison in comparisons],
            margins_N=known(comparison.margin for comparison in comparisons),
            gold_chosen_N=known(comparison.extra.get("gold_chosen") for comparison in comparisons),
            gold_rejected_N=known(comparison.extra.get("gold_rejected") for comparison in comparisons),
        )
        self.details: dict[str, Any] = {}

    def __call__(self, rows_N2: NDArray[np.float32]) -> dict[str, float]:
        """Keys `accuracy`, `ece` and so on. Raises ConfigError when a score is not finite."""
        if not np.isfinite(rows_N2).all():
            raise ConfigError("held-out scores are not finite; lower reward.optimizer.learning_rate")
        chosen_N, rejected_N = rows_N2.astype(np.float64).T
        metrics = preference_metrics(chosen_N, rejected_N, self.pairs)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        tables = {key: value for key, value in metrics.items() if key not in numbers}
        self.details = {f"reward/{key}": value for key, value in numbers.items()} | tables
        return numbers


def reference_scores(
    trainer: RewardTrainer, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: Config
) -> Tensor:
    """Raw scores of the posts' reference summaries, on the CPU."""
    sequences = []
    for example in examples:
        try:
            prompt = encode_prompt(tokenizer, example.post, max_tokens=config.prompt.max_prompt_tokens)
        except ValueError:
            continue  # such posts are left out of every stage
        response = encode_response(tokenizer, example.summary, max_tokens=config.prompt.max_response_tokens)
        sequences.append(prompt.ids + response)
    model = trainer.model.eval()
    model.config.score_shift = 0.0  # a resumed model may carry one
    scorer = Scorer(model, pad_id=tokenizer.pad_token_id, batch_tokens=config.prepare.batch_tokens)
    with trainer.accelerator.autocast():
        return scorer.score(sequences)
