"""Supervised fine-tuning: the base model learns to write summaries.

Loss on the summary and EOS; batches of similar length; ROUGE of summaries that the model generates, never of
teacher-forced tokens.

Shapes: B batch, T token, K positions whose next token counts, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.collate import IGNORED, EncodedExample, ExampleCollator, fitting_posts, token_ids
from rlhf.config import Config, PromptConfig
from rlhf.data import Example, load_examples
from rlhf.generation import BuiltinEngine, Sampling
from rlhf.models import load_policy, stamp_prompt_version
from rlhf.prompt import decode_response, encode_prompt, encode_response
from rlhf.rouge import rouge_scores
from rlhf.runtime import StopSignal, agreed, from_first, prepare_runtime
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


def run(config: Config, run_dir: Path, stop: StopSignal) -> None:
    """Fine-tune `fetch/final/base` on `fetch/final/data` and publish `sft/final`."""
    device = prepare_runtime(config.runtime, seed=config.seed)
    fetched, stage = StageDir(run_dir, "fetch").final(), StageDir(run_dir, "sft")
    remove_unpublished(stage)

    # 1. Posts and summaries become token ids, once.
    tokenizer = load_tokenizer(fetched / "base", key="fetch/final/base")
    train = encode_examples(tokenizer, load_examples(fetched / "data", "train"), prompt=config.prompt)
    valid_examples = load_examples(fetched / "data", "valid")
    valid = sorted(encode_examples(tokenizer, valid_examples, prompt=config.prompt), key=lambda e: e.length)

    # 2. The base model, or the newest checkpoint of an interrupted run.
    plan = plan_training(config.sft, name="sft", examples=len(train))
    arguments = training_arguments(
        config.sft, stage=stage, plan=plan, runtime=config.runtime, device=device, seed=config.seed
    )
    start = from_first(stage.latest)
    model = load_policy(start[1] if start else fetched / "base")
    stamp_prompt_version(model)

    # 3. Train, evaluate, publish.
    with TrainingLog(
        stage, total_steps=plan.total_steps, resumed_at=start[0] if start else None, runtime=config.runtime
    ) as log:
        trainer = SftTrainer(
            model=model,
            section=config.sft,
            arguments=arguments,
            collator=ExampleCollator(pad_id=tokenizer.pad_token_id, loss_on=config.sft.loss_on),
            train=train,
            valid=valid,
            measure=SftMetrics(config, tokenizer, model, valid_examples, stop),
            callback=StageCallback(stage=stage, tokenizer=tokenizer, runtime=config.runtime, log=log, stop=stop),
        )
        train_to_end(trainer, start=start, stop=stop)
        metrics = {f"sft/{key}": value for key, value in trainer.evaluate().items()}
        check_stop(trainer, stop)
        publish_model(
            trainer,
            stage=stage,
            tokenizer=tokenizer,
            metrics=json.dumps(metrics, indent=1),
            keep=config.runtime.keep_checkpoints,
        )


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, prompt: PromptConfig
) -> list[EncodedExample]:
    """Token ids of prompts and responses; examples whose header alone is too long are left out and counted.

    Raises DataError when none is left.
    """
    encoded = []
    for example, ids in fitting_posts(tokenizer, examples, max_tokens=prompt.max_prompt_tokens):
        response = encode_response(tokenizer, example.summary, max_tokens=prompt.max_response_tokens)
        encoded.append(EncodedExample(prompt=token_ids(ids), response=token_ids(response)))
    return encoded


def response_nll(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats of each row's counted tokens, summed, and their number: nll_B, tokens_B."""
    keep_K = batch["logits_to_keep"]
    logits_BKV = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=keep_K,
        use_cache=False,
    ).logits.float()
    targets_BK = batch["labels"][:, keep_K + 1]
    nll = F.cross_entropy(logits_BKV.flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view_as(targets_BK).sum(dim=1), (targets_BK != IGNORED).sum(dim=1)


class SftTrainer(StageTrainer):
    """Cross-entropy, averaged over the counted tokens of the whole batch, however it is split up."""

    loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's part of the loss; num_items_in_batch counts over all micro-batches and processes."""
        assert num_items_in_batch is not None, "the Trainer counts labels"
        nll_B, _ = response_nll(model, inputs)
        # Gradients are averaged over processes, but this is already a share of the whole.
        return nll_B.sum() / num_items_in_batch * self.accelerator.num_processes

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, None]:
        """A row an example: summed negative log-likelihood, and the number of tokens."""
        with torch.no_grad():
            nll_B, tokens_B = response_nll(model, self._prepare_inputs(inputs))
        return None, torch.stack((nll_B, tokens_B.float()), dim=1), None


class SftMetrics:
    """Loss a token over the held-out posts, and ROUGE of greedy summaries of the first of them."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        model: Any,
        examples: Sequence[Example],
        stop: StopSignal,
    ) -> None:
        self.config, self.tokenizer, self.model, self.stop = config, tokenizer, model, stop
        self.prompts: list[list[int]] = []
        self.references: list[str] = []
        for example in examples:
            if len(self.prompts) == config.sft.rouge_posts:
                break
            try:
                ids = encode_prompt(tokenizer, example.post, max_tokens=config.prompt.max_prompt_tokens).ids
            except ValueError:
                continue  # encode_examples has reported it
            self.prompts.append(ids)
            self.references.append(example.summary)

    def __call__(self, rows_N2: NDArray[np.float32]) -> dict[str, float]:
        """Keys `eval_loss`, `eval_rouge1` and so on; asked to stop in between, the loss alone."""
        nll, tokens = rows_N2.astype(np.float64).sum(axis=0)
        metrics = {"eval_loss": float(nll / tokens)}
        generated = self._summaries()
        if generated is None:
            return metrics
        summaries, lengths, ended = generated
        rouge = rouge_scores(summaries, self.references)
        metrics |= {f"eval_{name}": float(np.mean(values)) for name, values in rouge.items()}
        return metrics | {"eval_response_tokens": float(np.mean(lengths)), "eval_ended": float(np.mean(ended))}

    def _summaries(self) -> tuple[list[str], list[int], list[bool]] | None:
        """Greedy summaries of the posts, their lengths in tokens and whether they ended; None when stopping."""
        state = PartialState()
        engine = BuiltinEngine(self.model, eos_id=self.tokenizer.eos_token_id, pad_id=self.tokenizer.pad_token_id)
        sampling = Sampling(max_new_tokens=self.config.prompt.max_response_tokens, temperature=0.0)
        mine = list(range(state.process_index, len(self.prompts), state.num_processes))
        mine.sort(key=lambda index: len(self.prompts[index]))
        at_once = self.config.evaluate.batch_size
        rows: list[tuple[int, str, int, bool]] = []
        for start in range(0, len(mine), at_once):
            if self.stop.requested:
                break
            chunk = mine[start : start + at_once]
            generation = engine.generate([self.prompts[index] for index in chunk], sampling)
            lengths = generation.response_mask_BR.sum(dim=1).tolist()
            for row, index in enumerate(chunk):
                text = decode_response(self.tokenizer, generation.response_BR[row, : lengths[row]].tolist())
                rows.append((index, text, lengths[row], bool(generation.ended_B[row])))
        if agreed(self.stop.requested):
            return None
        rows = sorted(gather_object(rows))
        return [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows]
