"""The passes of the evaluation over the test posts: what the policies write, how likely they find it, what it scores.

Each goes batch by batch and continues where a process before it ended; a model is loaded only when a batch of its
pass is missing. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.advantages import k1, k3
from rlhf.checkpoint import fingerprint
from rlhf.config import Config
from rlhf.data import Example
from rlhf.evaluation import ROWS, Floats
from rlhf.generation import BuiltinEngine, Sampling, Summaries, summarize
from rlhf.likelihood import response_logprobs
from rlhf.models import load_policy, load_reward_model
from rlhf.partial import ChunkedWork, Compute, chunks_by_length
from rlhf.prompt import encode_response
from rlhf.runtime import choose_device, generator, torch_dtype
from rlhf.score_batches import length_batches
from rlhf.scoring import Scorer

# Each use of chance has a stream of its own, so that none depends on what ran before it.
PPO_SUMMARIES, SFT_SUMMARIES, KL_SAMPLES = range(3)
PASSES = 9
"""Over all posts: summaries, KL samples and their likelihood by PPO; summaries and likelihood by SFT; four to score."""

LoadModel: TypeAlias = Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Inputs:
    """The test posts, what the finished stages have published, by stage, and what every pass needs."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    prompts: list[list[int]]
    finished: dict[str, Path]
    work: ChunkedWork


def policy_passes(inputs: Inputs) -> tuple[dict[str, Summaries], dict[str, Floats]]:
    """The summaries of both policies, and two estimates of PPO's KL to SFT for each post.

    Greedy texts say nothing about the KL, so it is measured on summaries sampled from PPO at its own temperature.
    """
    decode_at, sample_at = inputs.config.evaluate.temperature, inputs.config.ppo.temperature
    written = {}
    policy = cache(partial(load_for_evaluation, inputs, "ppo"))
    written["ppo"] = summaries(inputs, "ppo", policy, temperature=decode_at, stream=PPO_SUMMARIES)
    sampled = summaries(inputs, "ppo", policy, temperature=sample_at, stream=KL_SAMPLES).responses
    ppo_logprobs = likelihood(inputs, "ppo", policy, sampled)
    del policy  # before the next one is loaded: two may not fit
    policy = cache(partial(load_for_evaluation, inputs, "sft"))
    written["sft"] = summaries(inputs, "sft", policy, temperature=decode_at, stream=SFT_SUMMARIES)
    sft_logprobs = likelihood(inputs, "sft", policy, sampled)

    pairs = [
        (torch.tensor(ours), torch.tensor(theirs)) for ours, theirs in zip(ppo_logprobs, sft_logprobs, strict=True)
    ]
    kl = {
        "kl": np.array([float(k1(ours, theirs).sum()) for ours, theirs in pairs]),
        # The samples are PPO's, so the estimate of KL(PPO || SFT) takes the ratio of SFT to PPO.
        "kl_k3": np.array([float(k3(theirs, ours).sum()) for ours, theirs in pairs]),
    }
    return written, kl


def load_for_evaluation(inputs: Inputs, stage: str) -> PreTrainedModel:
    """The policy of a stage on its device, in the precision of computation."""
    runtime = inputs.config.runtime
    return load_policy(inputs.finished[stage], dtype=torch_dtype(runtime.precision), device=choose_device(runtime))


def summaries(inputs: Inputs, stage: str, policy: LoadModel, *, temperature: float, stream: int) -> Summaries:
    """A response to every post."""
    config, tokenizer = inputs.config, inputs.tokenizer
    sampling = Sampling(max_new_tokens=config.prompt.max_response_tokens, temperature=temperature)

    def load() -> Compute:
        engine = BuiltinEngine(policy(), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)

        def write(number: int, prompts: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
            # A stream a batch: who continues need not draw what the batches before it drew.
            chance = generator(config.seed, stream, number)
            made = summarize(engine, prompts, sampling, batch_size=len(prompts), generator=chance)
            return list(zip(made.responses, made.ended, strict=True))

        return write

    chunks = chunks_by_length([len(prompt) for prompt in inputs.prompts], config.evaluate.batch_size)
    chance = {"temperature": temperature, "seed": config.seed, "stream": stream}
    what = made_by(inputs, stage, "summaries") | chance | {"max_new_tokens": sampling.max_new_tokens}
    made = inputs.work.results(what, inputs.prompts, chunks, load)
    return Summaries([response for response, _ in made], [ended for _, ended in made])


def likelihood(inputs: Inputs, stage: str, policy: LoadModel, responses: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of responses that were sampled at `ppo.temperature`, a list of float32 numbers a post."""
    temperature = inputs.config.ppo.temperature

    def load() -> Compute:
        model = policy()

        def judge(number: int, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
            prompts, sampled = [prompt for prompt, _ in pairs], [response for _, response in pairs]
            found = response_logprobs(model, prompts, sampled, temperature=temperature, batch_size=len(pairs))
            return [logprobs_R.tolist() for logprobs_R in found]

        return judge

    chunks = chunks_by_length([len(prompt) for prompt in inputs.prompts], inputs.config.evaluate.batch_size)
    what = made_by(inputs, stage, "likelihood") | {"temperature": temperature}
    return inputs.work.results(what, list(zip(inputs.prompts, responses, strict=True)), chunks, load)


def score_summaries(
    inputs: Inputs, texts: Mapping[str, Sequence[str]], written: Mapping[str, Summaries]
) -> dict[str, Floats]:
    """The reward model's score of every summary, a value a post."""
    config = inputs.config
    batch_tokens = config.evaluate.batch_tokens

    def load() -> Compute:
        device, dtype = choose_device(config.runtime), torch_dtype(config.runtime.precision)
        model = load_reward_model(inputs.finished["reward"], dtype=dtype, device=device)
        scorer = Scorer(model, batch_tokens=batch_tokens)
        return lambda number, sequences: scorer.score(sequences).tolist()

    responses = token_responses(inputs, texts, written)
    # Post by post, so that the scorer reads each prompt once for all that was written for it.
    sequences = [[*prompt, *responses[name][number]] for number, prompt in enumerate(inputs.prompts) for name in ROWS]
    lengths = [
        len(prompt) + sum(len(responses[name][number]) for name in ROWS) for number, prompt in enumerate(inputs.prompts)
    ]
    # What the scorer takes at a time, so that a chunk is a batch.
    posts = length_batches(lengths, tokens=batch_tokens, grid=batch_tokens)
    chunks = [[post * len(ROWS) + column for post in chunk for column in range(len(ROWS))] for chunk in posts]
    scores = inputs.work.results(made_by(inputs, "reward", "scores"), sequences, chunks, load)
    scores_NW = np.array(scores, dtype=np.float64).reshape(-1, len(ROWS))
    return {name: scores_NW[:, column] for column, name in enumerate(ROWS)}


def token_responses(
    inputs: Inputs, texts: Mapping[str, Sequence[str]], written: Mapping[str, Summaries]
) -> Mapping[str, Sequence[Sequence[int]]]:
    """Every summary as the tokens that are scored: those that a policy wrote, and the others' texts encoded."""
    limit = inputs.config.prompt.max_response_tokens
    encoded = {
        name: [encode_response(inputs.tokenizer, text, max_tokens=limit) for text in texts[name]]
        for name in ROWS
        if name not in written
    }
    return {name: encoded[name] if name in encoded else written[name].responses for name in ROWS}


def made_by(inputs: Inputs, stage: str, what: str) -> dict[str, Any]:
    """What results of a stage's model depend on beside their inputs; by this they are found again."""
    runtime = inputs.config.runtime
    machine = {"precision": runtime.precision, "device": choose_device(runtime).type}
    return {"what": what, "model": fingerprint(inputs.finished[stage])} | machine
