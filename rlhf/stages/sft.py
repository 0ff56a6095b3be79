"""Supervised fine-tuning: the base model learns to write summaries.

Loss on the summary and EOS; batches of similar length; ROUGE of summaries that the model generates, never of
teacher-forced tokens.

Shapes: B sequences, K tokens that are kept, whose next token counts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.collate import EncodedExample, ExampleBatch, fitting_posts, pack_examples, token_ids
from rlhf.config import Config, PromptConfig
from rlhf.data import Example, load_examples
from rlhf.errors import DivergedError
from rlhf.forward import token_logits
from rlhf.generation import BuiltinEngine, Sampling
from rlhf.lora import adapt
from rlhf.models import load_policy, stamp_prompt_version
from rlhf.prompt import decode_response, encode_prompt, encode_response
from rlhf.rouge import rouge_scores
from rlhf.runtime import from_first, prepare_runtime, torch_dtype
from rlhf.stopping import StopSignal
from rlhf.tokenizer import load_tokenizer
from rlhf.training import train
from rlhf.training_eval import held_out_rows
from rlhf.training_setup import Interrupted, Task, accelerator_for, plan_training
from rlhf.vocabulary import choice_logprobs

logger = logging.getLogger(__name__)


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Fine-tune `fetch/final/base` on `fetch/final/data` and publish `sft/final`."""
    device = prepare_runtime(config.runtime, seed=config.seed)
    fetched = StageDir(stage.run_dir, "fetch").final()

    # 1. Posts and summaries become token ids, once.
    tokenizer = load_tokenizer(fetched / "base", key="fetch/final/base")
    examples = encode_examples(tokenizer, load_examples(fetched / "data", "train"), prompt=config.prompt)
    valid_examples = load_examples(fetched / "data", "valid")
    valid = sorted(encode_examples(tokenizer, valid_examples, prompt=config.prompt), key=lambda e: e.length)

    # 2. The base model, or the newest checkpoint of an interrupted run.
    plan = plan_training(config.sft, name="sft", examples=len(examples))
    accelerator = accelerator_for(config.sft, name="sft", plan=plan, runtime=config.runtime, device=device)
    start = from_first(stage.latest)
    base, lora = partial(load_policy, fetched / "base"), config.sft.lora
    if lora.rank is None:
        model = load_policy(start[1]) if start else base()
    else:
        model = adapt(
            base(),
            lora,
            key="sft",
            seed=config.seed,
            dtype=torch_dtype(config.runtime.precision),
            device=accelerator.device,
            start=start[1] if start else None,
        )
    stamp_prompt_version(model)
    take_batches(model)

    # 3. Train, evaluate, publish.
    task = Task(
        section=config.sft,
        model=model,
        source=base,
        examples=examples,
        collate=partial(pack_examples, loss_on=config.sft.loss_on),
        loss=lambda model, batch: -model(batch).sum(),
        evaluate=Evaluation(config, tokenizer, model, valid, valid_examples),
        finish=lambda measured, _: measured,
    )
    train(task, plan, accelerator, config=config, stage=stage, tokenizer=tokenizer, start=start, stop=stop)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, prompt: PromptConfig
) -> list[EncodedExample]:
    """Token ids of prompts and responses; examples whose header alone is too long are left out and counted.

    Raises DataError when none is left.
    """
    encoded = []
    for example, ids in fitting_posts(tokenizer, examples, max_tokens=prompt.max_prompt_tokens):
        response = encode_response(tokenizer, example.summary, max_tokens=prompt.max_response_tokens)
        encoded.append(EncodedExample(example.post.id, prompt=token_ids(ids), response=token_ids(response)))
    return encoded


def take_batches(policy: PreTrainedModel) -> None:
    """Make the policy's forward give target_logprobs where it gets a batch; otherwise it does what it did.

    What wraps a model for training (DDP, DeepSpeed, autocast) sees forward alone, and generation needs it as it was.
    """
    plain = policy.forward

    @wraps(plain)  # transformers reads the signature
    def forward(*inputs: Any, **named: Any) -> Any:
        if inputs and isinstance(inputs[0], ExampleBatch):
            return target_logprobs(policy, inputs[0])
        return plain(*inputs, **named)

    policy.forward = forward


def target_logprobs(policy: PreTrainedModel, batch: ExampleBatch) -> Tensor:
    """Log-probability in nats of each token that counts, sequence by sequence: logprobs_K, float32, with gradients."""
    return choice_logprobs(token_logits(policy, batch.packed), batch.targets_K)[0]


class Evaluation:
    """Loss a token over the held-out posts, and ROUGE of greedy summaries of the first of them."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        valid: Sequence[EncodedExample],
        examples: Sequence[Example],
    ) -> None:
        self.config, self.tokenizer, self.model, self.valid = config, tokenizer, model, valid
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

    def __call__(self, interrupted: Interrupted) -> dict[str, float] | None:
        """Keys `sft/eval_loss`, `sft/eval_rouge1` and so on; None when interrupted.

        Raises DivergedError when the loss is not finite.
        """
        size = self.config.sft.micro_batch_size
        rows_N2 = held_out_rows(self.valid, self._nll_and_tokens, size=size, interrupted=interrupted)
        generated = None if rows_N2 is None else self._summaries(interrupted)
        if rows_N2 is None or generated is None:
            return None
        summaries, lengths, ended = generated
        rouge = rouge_scores(summaries, self.references)
        metrics = {"sft/eval_loss": loss_a_token(rows_N2)}
        metrics |= {f"sft/eval_{name}": float(np.mean(values)) for name, values in rouge.items()}
        return metrics | {"sft/eval_response_tokens": float(np.mean(lengths)), "sft/eval_ended": float(np.mean(ended))}

    def _nll_and_tokens(self, examples: Sequence[EncodedExample]) -> Tensor:
        batch = pack_examples(examples, loss_on=self.config.sft.loss_on).to(self.model.device)
        logprobs_K: Tensor = self.model(batch)
        counts_B = batch.packed.kept_mask().sum(dim=1)
        return torch.stack((-batch.packed.per_sequence(logprobs_K).sum(dim=1), counts_B), dim=1)

    def _summaries(self, interrupted: Interrupted) -> tuple[list[str], list[int], list[bool]] | None:
        """Greedy summaries of the posts, their lengths in tokens and whether they ended; None when interrupted."""
        state = PartialState()
        engine = BuiltinEngine(self.model, eos_id=self.tokenizer.eos_token_id, pad_id=self.tokenizer.pad_token_id)
        sampling = Sampling(max_new_tokens=self.config.prompt.max_response_tokens, temperature=0.0)
        mine = list(range(state.process_index, len(self.prompts), state.num_processes))
        mine.sort(key=lambda index: len(self.prompts[index]))
        at_once, most = self.config.evaluate.batch_size, math.ceil(len(self.prompts) / state.num_processes)
        rows: list[tuple[int, str, int, bool]] = []
        for start in range(0, most, at_once):
            if interrupted():
                return None
            chunk = mine[start : start + at_once]
            if not chunk:
                continue  # of the last post, on a process that has one less
            generation = engine.generate([self.prompts[index] for index in chunk], sampling)
            lengths = generation.response_mask_BR.sum(dim=1).tolist()
            for row, index in enumerate(chunk):
                text = decode_response(self.tokenizer, generation.response_BR[row, : lengths[row]].tolist())
                rows.append((index, text, lengths[row], bool(generation.ended_B[row])))
        rows = sorted(gather_object(rows))
        return [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows]


def loss_a_token(rows_N2: NDArray[np.float32]) -> float:
    """The mean over all tokens, from summed losses and numbers of tokens. Raises DivergedError unless finite."""
    nll, tokens = rows_N2.astype(np.float64).sum(axis=0)
    if not np.isfinite(nll):
        raise DivergedError("the loss on held-out posts is not finite; lower sft.optimizer.learning_rate in a new run")
    return float(nll / tokens)
