"""Evaluate: SFT, PPO, the reference and the post's lead, on the test posts.

 1. summaries of both policies, and PPO's KL to SFT on summaries sampled from PPO
 2. the reward model's score of all four
 3. ROUGE, lengths, gold score where the posts' facts are known
 4. means, win rates and gains with intervals; the files and the report

One model is in memory at a time. The policies' summaries are scored as the tokens that were generated, so that one
that never ended is seen as such; the reference and the lead are encoded, with EOS, and cut to
`prompt.max_response_tokens`.

`evaluate/final/results.json`, where an interval is {"mean", "low", "high"} and what has no meaning is null:

    rows.{sft,ppo,reference,lead}
        rouge1 rouge2 rougeL rougeLsum      F-measure, 0 to 1; null for the reference
        reward delta_reward                 score; score minus the reference's score
        win_rate_vs_{sft,reference}         0 to 1, a tie counts half; null against itself
        lc_win_rate_vs_{sft,reference}      the same at equal length
        kl kl_k3                            nats a summary: log-ratio, and the estimate that PPO logs; 0 for SFT
        length_tokens length_words          without EOS
        ended                               share that ended by EOS (a number)
        gold                                gold score; null for real posts
    comparisons.{reward_gain,gold_gain,rougeL_gain,length_gain}   PPO minus SFT on the same posts
    reward_model                            copy of reward/final/metrics.json
    settings                                posts, posts_left_out, seed, temperature, kl_temperature, bootstrap_samples,
                                            lead_sentences, max_response_tokens

`summaries.csv` and `samples.jsonl` hold a row a post: id, subreddit, title, post, and for each kind of summary
its text, `score_`, `tokens_`, `rouge1_` and `gold_`.

Shapes: N posts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.advantages import k1, k3
from rlhf.checkpoint import StageDir
from rlhf.collate import fitting_posts
from rlhf.config import Config
from rlhf.data import Example, load_examples, write_jsonl
from rlhf.evaluation import (
    ROWS,
    Floats,
    Measured,
    Resampling,
    as_csv,
    gains,
    lead_summary,
    row_results,
    sample_rows,
    word_counts,
)
from rlhf.generation import BuiltinEngine, Sampling, Summaries, summarize
from rlhf.likelihood import response_logprobs
from rlhf.models import load_policy, load_reward_model
from rlhf.prompt import decode_response, encode_response
from rlhf.report import write_report
from rlhf.rouge import OfflineRouge
from rlhf.runtime import StopSignal, choose_device, generator, prepare_runtime, torch_dtype
from rlhf.scoring import Scorer
from rlhf.synthetic import gold_score
from rlhf.telemetry import Progress
from rlhf.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# Each use of chance has a stream of its own, so that none depends on what ran before it.
PPO_SUMMARIES, SFT_SUMMARIES, KL_SAMPLES = range(3)
PASSES = 9
"""Over all posts: summaries, KL samples and their likelihood by PPO; summaries and likelihood by SFT; four to score."""


class Meter:
    """Adds up what several passes have done, moves the bar, and heeds a signal to stop."""

    def __init__(self, progress: Progress, stop: StopSignal) -> None:
        self._progress, self._stop, self._before, self._now = progress, stop, 0, 0

    def __call__(self, done: int) -> None:
        """`done` counts within the present pass. Raises StopRequested."""
        self._now = self._before + done
        self._progress.update(self._now)
        self._stop.check()

    def next_pass(self) -> Meter:
        """Count on from here."""
        self._before = self._now
        return self


@dataclass(frozen=True)
class Inputs:
    """The test posts, and what every pass over them needs."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    prompts: list[list[int]]
    meter: Meter


def run(config: Config, run_dir: Path, stop: StopSignal) -> None:
    """Evaluate and publish `evaluate/final`, then write `<run>/report/index.html`.

    Raises PrerequisiteError when an earlier stage is missing, and StopRequested after a signal: an evaluation has
    no state worth saving and begins again.
    """
    data = StageDir(run_dir, "fetch").final() / "data"
    sft, reward, ppo = (StageDir(run_dir, name).final() for name in ("sft", "reward", "ppo"))
    stage = StageDir(run_dir, "evaluate")
    prepare_runtime(config.runtime, seed=config.seed)
    tokenizer = load_tokenizer(sft, key="sft/final")
    posts = load_examples(data, "test")[: config.evaluate.max_posts]
    limit = config.prompt.max_prompt_tokens
    fitting = list(fitting_posts(tokenizer, posts, max_tokens=limit, kind="test posts"))
    examples, prompts = [example for example, _ in fitting], [ids for _, ids in fitting]

    with Progress(stage.path, "evaluate", PASSES * len(examples), "summaries") as progress:
        inputs = Inputs(config, tokenizer, examples, prompts, Meter(progress, stop))
        # 1. Summaries and KL.
        written, kl = policy_passes(inputs, sft=sft, ppo=ppo)
        texts = all_texts(inputs, written)
        # 2. Scores.
        scores = score_summaries(inputs, texts, written, reward=reward)

    # 3. What can be counted.
    measured = measure(inputs, texts, scores, written, kl)
    # 4. Means, files, report.
    resampling = Resampling(samples=config.evaluate.bootstrap_samples, seed=config.seed)
    results = {
        "rows": {name: row_results(measured, name, resampling) for name in ROWS},
        "comparisons": gains(measured["ppo"], measured["sft"], resampling),
        "reward_model": json.loads((reward / "metrics.json").read_text(encoding="utf-8")),
        "settings": settings(config, posts=len(examples), left_out=len(posts) - len(examples)),
    }
    samples = sample_rows([example.post for example in examples], texts, measured)
    with stage.publish(1, final=True) as directory:
        (directory / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (directory / "summaries.csv").write_text(as_csv(samples), encoding="utf-8")
        write_jsonl(directory / "samples.jsonl", samples)
    logger.info("report path=%s", write_report(run_dir))


def policy_passes(inputs: Inputs, *, sft: Path, ppo: Path) -> tuple[dict[str, Summaries], dict[str, Floats]]:
    """The summaries of both policies, and two estimates of PPO's KL to SFT for each post.

    Greedy texts say nothing about the KL, so it is measured on summaries sampled from PPO at its own temperature.
    """
    decode_at, sample_at = inputs.config.evaluate.temperature, inputs.config.ppo.temperature
    written = {}
    policy = load_for_evaluation(inputs, ppo)
    written["ppo"] = summaries(inputs, policy, temperature=decode_at, stream=PPO_SUMMARIES)
    sampled = summaries(inputs, policy, temperature=sample_at, stream=KL_SAMPLES).responses
    ppo_logprobs = likelihood(inputs, policy, sampled)
    del policy  # before the next one is loaded: two may not fit
    policy = load_for_evaluation(inputs, sft)
    written["sft"] = summaries(inputs, policy, temperature=decode_at, stream=SFT_SUMMARIES)
    sft_logprobs = likelihood(inputs, policy, sampled)

    pairs = list(zip(ppo_logprobs, sft_logprobs, strict=True))
    kl = {
        "kl": np.array([float(k1(ours, theirs).sum()) for ours, theirs in pairs]),
        # The samples are PPO's, so the estimate of KL(PPO || SFT) takes the ratio of SFT to PPO.
        "kl_k3": np.array([float(k3(theirs, ours).sum()) for ours, theirs in pairs]),
    }
    return written, kl


def load_for_evaluation(inputs: Inputs, path: Path) -> PreTrainedModel:
    """A policy on its device, in the precision of computation."""
    runtime = inputs.config.runtime
    return load_policy(path, dtype=torch_dtype(runtime.precision), device=choose_device(runtime))


def summaries(inputs: Inputs, policy: PreTrainedModel, *, temperature: float, stream: int) -> Summaries:
    """A response to every post."""
    config, tokenizer = inputs.config, inputs.tokenizer
    return summarize(
        BuiltinEngine(policy, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id),
        inputs.prompts,
        Sampling(max_new_tokens=config.prompt.max_response_tokens, temperature=temperature),
        batch_size=config.evaluate.batch_size,
        generator=generator(config.seed, stream),
        on_progress=inputs.meter.next_pass(),
    )


def likelihood(inputs: Inputs, policy: PreTrainedModel, responses: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of responses that were sampled at `ppo.temperature`."""
    return response_logprobs(
        policy,
        inputs.prompts,
        responses,
        temperature=inputs.config.ppo.temperature,
        pad_id=inputs.tokenizer.pad_token_id,
        batch_size=inputs.config.evaluate.batch_size,
        on_progress=inputs.meter.next_pass(),
    )


def all_texts(inputs: Inputs, written: Mapping[str, Summaries]) -> dict[str, list[str]]:
    """The four kinds of summaries as texts; the reference in full, the lead cut to a policy's limit."""
    tokenizer, config = inputs.tokenizer, inputs.config
    texts = {name: [decode_response(tokenizer, ids) for ids in found.responses] for name, found in written.items()}
    texts["reference"] = [example.summary for example in inputs.examples]
    leads = [lead_summary(example.post.body, config.evaluate.lead_sentences) for example in inputs.examples]
    limit = config.prompt.max_response_tokens
    texts["lead"] = [decode_response(tokenizer, encode_response(tokenizer, lead, max_tokens=limit)) for lead in leads]
    return texts


def score_summaries(
    inputs: Inputs, texts: Mapping[str, Sequence[str]], written: Mapping[str, Summaries], *, reward: Path
) -> dict[str, Floats]:
    """The reward model's score of every summary, a value a post."""
    config, tokenizer = inputs.config, inputs.tokenizer
    device, dtype = choose_device(config.runtime), torch_dtype(config.runtime.precision)
    model = load_reward_model(reward, dtype=dtype, device=device)
    scorer = Scorer(model, pad_id=tokenizer.pad_token_id, batch_tokens=config.evaluate.batch_tokens)
    limit, scores = config.prompt.max_response_tokens, {}
    for name in ROWS:
        if name in written:
            responses = written[name].responses
        else:
            responses = [encode_response(tokenizer, text, max_tokens=limit) for text in texts[name]]
        sequences = [[*prompt, *response] for prompt, response in zip(inputs.prompts, responses, strict=True)]
        scores[name] = scorer.score(sequences, on_progress=inputs.meter.next_pass()).double().numpy()
    return scores


def measure(
    inputs: Inputs,
    texts: Mapping[str, list[str]],
    scores: Mapping[str, Floats],
    written: Mapping[str, Summaries],
    kl: Mapping[str, Floats],
) -> dict[str, Measured]:
    """Everything that is known of each kind of summary, a value a post."""
    metric = OfflineRouge()
    nothing = np.zeros(len(inputs.examples))
    kl_of = {"ppo": kl, "sft": {"kl": nothing, "kl_k3": nothing}}
    measured = {}
    for name in ROWS:
        rouge: dict[str, Floats] = {}
        if name != "reference":
            lists = metric.compute(predictions=texts[name], references=texts["reference"], use_aggregator=False)
            rouge = {kind: np.asarray(values) for kind, values in lists.items()}
        measured[name] = Measured(
            score_N=scores[name],
            tokens_N=np.array([len(encode_response(inputs.tokenizer, text)) - 1.0 for text in texts[name]]),
            words_N=word_counts(texts[name]),
            rouge=rouge,
            ended_N=np.array(written[name].ended, dtype=np.float64) if name in written else None,
            gold_N=gold_scores(inputs.examples, texts[name]),
            kl_N=kl_of[name]["kl"] if name in kl_of else None,
            kl_k3_N=kl_of[name]["kl_k3"] if name in kl_of else None,
        )
    return measured


def gold_scores(examples: Sequence[Example], texts: Sequence[str]) -> Floats | None:
    """What the summaries are worth by the facts of synthetic posts; None where a post is real."""
    if not all("facts" in example.extra for example in examples):
        return None
    return np.array(
        [gold_score(example.extra["facts"], text) for example, text in zip(examples, texts, strict=True)],
        dtype=np.float64,
    )


def settings(config: Config, *, posts: int, left_out: int) -> dict[str, Any]:
    """What a reader needs to know to compare these results with others."""
    return {
        "posts": posts,
        "posts_left_out": left_out,
        "seed": config.seed,
        "temperature": config.evaluate.temperature,
        "kl_temperature": config.ppo.temperature,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
        "lead_sentences": config.evaluate.lead_sentences,
        "max_response_tokens": config.prompt.max_response_tokens,
    }
