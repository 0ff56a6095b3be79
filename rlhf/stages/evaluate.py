"""Evaluate: SFT, PPO, the reference and the post's lead, on the test posts.

 1. summaries of both policies, and PPO's KL to SFT on summaries sampled from PPO
 2. the reward model's score of all four
 3. ROUGE, lengths, gold score where the posts' facts are known
 4. means, win rates and gains with intervals; the files and the report

One model is in memory at a time. What a batch gave is on disk at once: who stops or kills an evaluation loses one
batch. The policies' summaries are scored as the tokens that were generated, so that one that never ended is seen as
such; the reference and the lead are encoded, with EOS, and cut to `prompt.max_response_tokens`.

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
from typing import Any

import numpy as np

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
from rlhf.generation import Summaries
from rlhf.partial import ChunkedWork, PartialResults
from rlhf.passes import PASSES, Inputs, policy_passes, score_summaries
from rlhf.processes import is_first_process
from rlhf.prompt import decode_response, encode_response
from rlhf.report import write_report
from rlhf.rouge import OfflineRouge
from rlhf.runtime import from_first, prepare_runtime
from rlhf.stopping import StopSignal
from rlhf.storage import UNFINISHED, remove
from rlhf.synthetic import gold_score
from rlhf.telemetry import Progress
from rlhf.tokenizer import load_tokenizer
from rlhf.watchdog import Watchdog

logger = logging.getLogger(__name__)

PARTIAL = "results.partial.jsonl"


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Write `<run>/report/index.html` and publish `evaluate/final`.

    Many processes share steps 1 and 2; the first does the rest. Raises PrerequisiteError when an earlier stage is
    missing, and StopRequested after a signal, with all but the batches in hand kept.
    """
    with stop.together():
        finished = {name: StageDir(stage.run_dir, name).final() for name in ("fetch", "sft", "reward", "ppo")}
        prepare_runtime(config.runtime, seed=config.seed)
        tokenizer = load_tokenizer(finished["sft"], key="sft/final")
        posts = load_examples(finished["fetch"] / "data", "test")[: config.evaluate.max_posts]
        fitting = list(fitting_posts(tokenizer, posts, max_tokens=config.prompt.max_prompt_tokens, kind="test posts"))
        examples, prompts = [example for example, _ in fitting], [ids for _, ids in fitting]

        with (
            Watchdog(config.runtime.hang_after_seconds) as watchdog,
            PartialResults(stage, PARTIAL) as results,
            Progress(stage, PASSES * len(examples), "summaries", enabled=is_first_process()) as progress,
        ):
            work = ChunkedWork(results, stop=stop, watchdog=watchdog, on_done=progress.update)
            inputs = Inputs(config, tokenizer, examples, prompts, finished, work)
            # 1. Summaries and KL.
            written, kl = policy_passes(inputs)
            texts = all_texts(inputs, written)
            # 2. Scores.
            scores = score_summaries(inputs, texts, written)

            def conclude() -> None:
                # 3. What can be counted.
                measured = measure(inputs, texts, scores, written, kl)
                # 4. Means, files, report.
                found = all_results(inputs, measured, left_out=len(posts) - len(examples))
                with stop.deferred():
                    publish(stage, found, sample_rows([example.post for example in examples], texts, measured))
                    results.remove()

            from_first(conclude)


def all_texts(inputs: Inputs, written: Mapping[str, Summaries]) -> dict[str, list[str]]:
    """The four kinds of summaries as texts; the reference in full, the lead cut to a policy's limit."""
    tokenizer, config = inputs.tokenizer, inputs.config
    texts = {name: [decode_response(tokenizer, ids) for ids in found.responses] for name, found in written.items()}
    texts["reference"] = [example.summary for example in inputs.examples]
    leads = [lead_summary(example.post.body, config.evaluate.lead_sentences) for example in inputs.examples]
    limit = config.prompt.max_response_tokens
    texts["lead"] = [decode_response(tokenizer, encode_response(tokenizer, lead, max_tokens=limit)) for lead in leads]
    return texts


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


def all_results(inputs: Inputs, measured: Mapping[str, Measured], *, left_out: int) -> dict[str, Any]:
    """What stands in results.json."""
    config = inputs.config
    resampling = Resampling(samples=config.evaluate.bootstrap_samples, seed=config.seed)
    return {
        "rows": {name: row_results(measured, name, resampling) for name in ROWS},
        "comparisons": gains(measured["ppo"], measured["sft"], resampling),
        "reward_model": json.loads((inputs.finished["reward"] / "metrics.json").read_text(encoding="utf-8")),
        "settings": settings(config, posts=len(inputs.examples), left_out=left_out),
    }


def publish(stage: StageDir, results: Mapping[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Write the files and the report, and make them final."""
    with stage.publish(1, final=True) as directory:
        (directory / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (directory / "summaries.csv").write_text(as_csv(samples), encoding="utf-8")
        write_jsonl(directory / "samples.jsonl", samples)
        stage.check()
        for leftover in (stage.run_dir / "report").glob(f"{UNFINISHED}*"):  # of a process killed at this place
            remove(leftover)
        # Before they are final: a finished evaluation is not run again, and would stay without its report.
        logger.info("report path=%s", write_report(stage.run_dir, evaluation=directory))


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
