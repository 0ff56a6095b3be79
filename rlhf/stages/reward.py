"""The reward model: the SFT policy learns which of two summaries people prefer.

Bottom blocks and embeddings stay as SFT left them. Held-out accuracy is reported beside what "the longer one
wins" would give, and with how well the model knows when it is right.

Shapes: P pairs of a batch, B summaries (2P, the chosen first), K scores that are read, R response columns, T columns of
prompt and response, N held-out pairs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.collate import EncodedPair, pair_id, token_ids
from rlhf.config import Config, PromptConfig
from rlhf.data import Comparison, Example, load_comparisons, load_examples
from rlhf.errors import ConfigError, DataError, DivergedError
from rlhf.forward import hidden_states
from rlhf.gptj import is_gptj
from rlhf.lora import adapt
from rlhf.losses import pairwise_divergent_loss, pairwise_last_loss
from rlhf.models import REWARD_HEAD, freeze_bottom, load_reward_model, reward_model_from_policy
from rlhf.pair_batches import DivergentPairs, PaddedPairs, PairBatch, pack_divergent, pack_pairs, pad_pairs
from rlhf.preference import Pairs, preference_metrics
from rlhf.prompt import encode_prompt, encode_response
from rlhf.runtime import from_first, prepare_runtime, torch_dtype
from rlhf.scoring import Scorer, read_scores, token_scores
from rlhf.stopping import StopSignal
from rlhf.tokenizer import load_tokenizer
from rlhf.training import train
from rlhf.training_eval import held_out_rows
from rlhf.training_setup import Batch, Interrupted, Task, accelerator_for, plan_training

logger = logging.getLogger(__name__)

SHIFT_POSTS = 2000
"""Training posts whose reference summaries are made to average 0."""
SHIFT_CHUNK = 200
"""So many of them are scored between two looks at whether to stop."""


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Train on `fetch/final/data`'s comparisons, starting from `sft/final`, and publish `reward/final`."""
    device = prepare_runtime(config.runtime, seed=config.seed)
    data = StageDir(stage.run_dir, "fetch").final() / "data"
    policy = StageDir(stage.run_dir, "sft").final()

    # 1. Comparisons become token ids, once.
    tokenizer = load_tokenizer(policy, key="sft/final")
    pairs = [pair for _, pair in encode_pairs(tokenizer, load_comparisons(data, "train"), config.prompt)]
    held_out = encode_pairs(tokenizer, load_comparisons(data, "valid"), config.prompt)
    held_out.sort(key=lambda entry: entry[1].length)
    references = reference_sequences(tokenizer, load_examples(data, "train")[:SHIFT_POSTS], config.prompt)

    # 2. The policy's weights under a fresh head, or the newest checkpoint of an interrupted run.
    plan = plan_training(config.reward, name="reward", examples=len(pairs))
    accelerator = accelerator_for(config.reward, name="reward", plan=plan, runtime=config.runtime, device=device)
    start = from_first(stage.latest)
    fresh = functools.partial(reward_model_from_policy, policy, seed=config.seed)
    model = build_model(config, fresh, start[1] if start else None, accelerator.device)
    take_batches(model)

    # 3. Train, look at the held-out pairs, shift the scores, publish.
    scorer = Scorer(model, batch_tokens=config.prepare.batch_tokens)
    evaluation = Evaluation(model, held_out, size=config.reward.micro_batch_size)
    task = Task(
        section=config.reward,
        model=model,
        source=fresh,
        examples=pairs,
        collate=collator(model, config.reward.loss, pad_id=tokenizer.pad_token_id),
        loss=pair_loss,
        evaluate=evaluation,
        finish=lambda _, interrupted: shift_scores(model, scorer, references, evaluation, interrupted),
    )
    train(task, plan, accelerator, config=config, stage=stage, tokenizer=tokenizer, start=start, stop=stop)


def build_model(
    config: Config, fresh: Callable[[], PreTrainedModel], start: Path | None, device: torch.device
) -> PreTrainedModel:
    """The model that `fresh` makes, or as checkpoint `start` left it, with its bottom blocks frozen."""
    lora, fraction = config.reward.lora, config.reward.frozen_fraction
    model = fresh() if start is None or lora.rank is not None else load_reward_model(start)
    frozen = freeze_bottom(model, fraction)
    logger.info("frozen blocks=%d fraction=%g", frozen, fraction)
    if lora.rank is None:
        return model
    if frozen == model.config.num_hidden_layers:
        raise ConfigError(f"reward.frozen_fraction={fraction} leaves no block to the adapters; lower it")
    return adapt(
        model,
        lora,
        key="reward",
        seed=config.seed,
        dtype=torch_dtype(config.runtime.precision),
        device=device,
        start=start,
        top_layers=model.config.num_hidden_layers - frozen,
        also_train=(REWARD_HEAD.removesuffix(".weight"),),
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
            tokens = [token_ids(part) for part in (ids, chosen, rejected)]
            encoded.append((comparison, EncodedPair(pair_id(comparison), *tokens)))
    if not encoded:
        raise DataError(
            f"none of {len(comparisons)} comparisons fits prompt.max_prompt_tokens={prompt.max_prompt_tokens} and "
            f"differs within prompt.max_response_tokens={prompt.max_response_tokens}; raise them"
        )
    if len(encoded) < len(comparisons):
        left_out = len(comparisons) - len(encoded)
        logger.warning("left out %d of %d pairs: header too long, or equal once cut", left_out, len(comparisons))
    return encoded


def collator(
    model: PreTrainedModel, loss: Literal["last", "divergent"], *, pad_id: int
) -> Callable[[Sequence[EncodedPair]], Batch]:
    """Makes the batches of this loss for this model."""
    if loss == "last":
        return pack_pairs
    return functools.partial(pack_divergent if is_gptj(model.base_model) else pad_pairs, pad_id=pad_id)


def pair_loss(model: nn.Module, batch: PairBatch | DivergentPairs | PaddedPairs) -> Tensor:
    """Bradley-Terry, summed over the batch's pairs: on the last scores, or in the other batches divergent."""
    scores: Tensor = model(batch)
    match batch:
        case PairBatch():
            mean = pairwise_last_loss(*scores.unflatten(0, (-1, 2)).unbind(dim=1))
        case DivergentPairs():
            scores_BR = scores[batch.read_BR]
            mean = pairwise_divergent_loss(*scores_BR.chunk(2), *batch.ids_BR.chunk(2), *batch.mask_BR.chunk(2))
        case PaddedPairs():
            mean = pairwise_divergent_loss(*scores.chunk(2), *batch.ids_BT.chunk(2), *batch.mask_BT.chunk(2))
    return mean * batch.counted


def take_batches(model: PreTrainedModel) -> None:
    """Make the model's forward give batch_scores.

    What wraps a model for training (DDP, DeepSpeed, autocast) sees forward alone.
    """
    model.forward = functools.partial(batch_scores, model)


def batch_scores(model: PreTrainedModel, batch: PairBatch | DivergentPairs | PaddedPairs) -> Tensor:
    """Raw scores with gradients: scores_K of the kept tokens, or of padded rows scores_BT."""
    if isinstance(batch, PaddedPairs):
        return token_scores(model, batch.ids_BT, batch.mask_BT)
    return read_scores(model, hidden_states(model.base_model, batch.packed))


class Evaluation:
    """Turns held-out scores into metrics: plain numbers for the curves, `details` for metrics.json."""

    def __init__(
        self,
        model: PreTrainedModel,
        held_out: Sequence[tuple[Comparison, EncodedPair]],
        *,
        size: int,
    ) -> None:
        self.model, self.size = model, size
        self.encoded = [pair for _, pair in held_out]
        comparisons = [comparison for comparison, _ in held_out]
        self.pairs = Pairs(
            chosen_tokens_N=known(len(pair.chosen) for pair in self.encoded),
            rejected_tokens_N=known(len(pair.rejected) for pair in self.encoded),
            sources=[comparison.source for comparison in comparisons],
            margins_N=known(comparison.margin for comparison in comparisons),
            gold_chosen_N=known(comparison.extra.get("gold_chosen") for comparison in comparisons),
            gold_rejected_N=known(comparison.extra.get("gold_rejected") for comparison in comparisons),
        )
        self.details: dict[str, Any] = {}

    def __call__(self, interrupted: Interrupted) -> dict[str, float] | None:
        """Keys `reward/accuracy`, `reward/ece` and so on; None when interrupted.

        Raises DivergedError when a score is not finite.
        """
        rows_N2 = held_out_rows(self.encoded, self._scores, size=self.size, interrupted=interrupted)
        if rows_N2 is None:
            return None
        if not np.isfinite(rows_N2).all():
            raise DivergedError("held-out scores are not finite; lower reward.optimizer.learning_rate in a new run")
        chosen_N, rejected_N = rows_N2.astype(np.float64).T
        metrics = preference_metrics(chosen_N, rejected_N, self.pairs)
        numbers = {f"reward/{key}": value for key, value in metrics.items() if isinstance(value, int | float)}
        tables = {key: value for key, value in metrics.items() if not isinstance(value, int | float)}
        self.details = numbers | tables
        return numbers

    def _scores(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """A row a pair: the raw scores of chosen and rejected."""
        scores_K: Tensor = self.model(pack_pairs(pairs).to(self.model.device))
        return scores_K.unflatten(0, (-1, 2))


def known(values: Iterable[float | None]) -> NDArray[np.float64]:
    """As an array, NaN where a value is not known."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def reference_sequences(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], prompt: PromptConfig
) -> list[list[int]]:
    """Token ids of posts with their reference summaries; posts that do not fit are left out, as in every stage."""
    sequences = []
    for example in examples:
        try:
            encoded = encode_prompt(tokenizer, example.post, max_tokens=prompt.max_prompt_tokens)
        except ValueError:
            continue
        sequences.append(
            encoded.ids + encode_response(tokenizer, example.summary, max_tokens=prompt.max_response_tokens)
        )
    return sequences


def shift_scores(
    model: PreTrainedModel,
    scorer: Scorer,
    references: Sequence[Sequence[int]],
    evaluation: Evaluation,
    interrupted: Interrupted,
) -> dict[str, Any] | None:
    """Make the references' scores average 0; returns what stands in metrics.json, None when interrupted."""
    model.eval()
    model.config.score_shift = 0.0  # a resumed model may carry one

    def score(chunk: Sequence[Sequence[int]]) -> Tensor:
        return scorer.score(chunk).unsqueeze(1)

    rows_N1 = held_out_rows(references, score, size=SHIFT_CHUNK, interrupted=interrupted)
    if rows_N1 is None:
        return None
    score_N = torch.from_numpy(rows_N1).squeeze(1)
    model.config.score_shift = float(score_N.mean())
    return evaluation.details | {
        "reward/score_mean": float(score_N.mean()),
        "reward/score_std": float(score_N.std()),
    }
