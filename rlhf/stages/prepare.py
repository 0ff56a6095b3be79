"""PPO's environment: prompts tokenised once, and the score of each one's reference summary.

A score costs a pass of the reward model, so each is written down as soon as it is known; a killed
process loses one chunk.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir, fingerprint
from rlhf.config import Config, PromptConfig
from rlhf.data import Example, load_examples
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.errors import ConfigError, DataError
from rlhf.models import load_reward_model
from rlhf.partial import ChunkedWork, Compute, PartialResults, chunks_by_length
from rlhf.processes import is_first_process
from rlhf.prompt import encode_prompt, encode_response
from rlhf.runtime import choose_device, from_first, prepare_runtime, torch_dtype
from rlhf.scoring import Scorer, scorable_tokens
from rlhf.stopping import StopSignal
from rlhf.telemetry import Progress
from rlhf.tokenizer import load_tokenizer
from rlhf.watchdog import Watchdog

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
CHUNK = 256
"""Sequences scored between two looks at the stop signal, and two writes to disk."""
PARTIAL = "scores.partial.jsonl"
LISTED = 20
"""Posts left out that the log names; summary.json names all."""


@dataclass(frozen=True)
class Candidate:
    """A post whose prompt and reference fit; the scored sequence is both together."""

    id: str
    prompt_ids: list[int]
    cut_tokens: int
    reference_ids: list[int]

    @property
    def sequence(self) -> list[int]:
        """What the reward model reads."""
        return self.prompt_ids + self.reference_ids


@dataclass
class Split:
    """The posts of one split, and what became of those that are not candidates."""

    name: str
    posts: int
    candidates: list[Candidate] = field(default_factory=list)
    duplicates: int = 0
    cut_references: int = 0
    left_out: dict[str, str] = field(default_factory=dict)  # reason by post id


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Tokenise the posts, score their references and publish `prepare/final`.

    Many processes share the scoring; the first publishes. Raises PrerequisiteError when fetch or reward has not
    finished, DataError when no post is left, and StopRequested after a signal, with the scores so far kept.
    """
    with stop.together():
        data, reward = (StageDir(stage.run_dir, name).final() for name in ("fetch", "reward"))
        prepare_runtime(config.runtime, seed=config.seed)

        # 1. Prompts and references become token ids, each post once.
        tokenizer = load_tokenizer(reward, key="reward/final")
        splits = [encode_split(tokenizer, name, load_examples(data / "data", name), config.prompt) for name in SPLITS]

        sequences = [candidate.sequence for split in splits for candidate in split.candidates]
        with (
            Watchdog(config.runtime.hang_after_seconds) as watchdog,
            PartialResults(stage, PARTIAL) as results,
            Progress(stage, len(sequences), "posts", enabled=is_first_process()) as progress,
        ):
            # 2. Each prompt with its reference gets its score, once.
            work = ChunkedWork(results, stop=stop, watchdog=watchdog, on_done=progress.update)
            scores = iter(score_all(config, reward, sequences, work))

            # 3. Published: a row for each post whose reference has a score.
            def conclude() -> None:
                rows = {s.name: environment_rows(s, list(islice(scores, len(s.candidates)))) for s in splits}
                for split in splits:
                    report(split, rows[split.name])
                with stop.deferred():
                    publish(stage, rows, {split.name: summarise(split, rows[split.name]) for split in splits})
                    results.remove()

            from_first(conclude)


def encode_split(
    tokenizer: PreTrainedTokenizerBase, name: str, examples: Sequence[Example], prompt: PromptConfig
) -> Split:
    """Token ids of each post's prompt and of its first reference; those that do not fit are noted by id."""
    split = Split(name, posts=len(examples))
    seen: set[str] = set()
    for example in examples:
        post = example.post
        if post.id in seen:
            split.duplicates += 1
            continue
        seen.add(post.id)
        if not example.summary.strip():
            split.left_out[post.id] = "the reference summary is empty"
            continue
        try:
            encoded = encode_prompt(tokenizer, post, max_tokens=prompt.max_prompt_tokens)
        except ValueError as error:
            split.left_out[post.id] = str(error)
            continue
        full_ids = encode_response(tokenizer, example.summary)
        ids = encode_response(tokenizer, example.summary, max_tokens=prompt.max_response_tokens)
        split.cut_references += len(ids) < len(full_ids)
        split.candidates.append(Candidate(post.id, list(encoded.ids), encoded.cut_tokens, ids))
    return split


def score_all(config: Config, reward: Path, sequences: Sequence[list[int]], work: ChunkedWork) -> list[float]:
    """The reward model's score of every sequence, which may be NaN or infinite, chunk by chunk."""
    runtime = config.runtime
    device = choose_device(runtime)

    def load() -> Compute:
        model = load_reward_model(reward, dtype=torch_dtype(runtime.precision), device=device)
        _check_length(config.prompt, scorable_tokens(model))
        scorer = Scorer(model, batch_tokens=config.prepare.batch_tokens)
        return lambda number, chunk: scorer.score(chunk, allow_nonfinite=True).tolist()

    what = {"model": fingerprint(reward), "precision": runtime.precision, "device": device.type}
    what |= {"batch_tokens": str(config.prepare.batch_tokens)}
    return work.results(what, sequences, chunks_by_length([len(ids) for ids in sequences], CHUNK), load)


def environment_rows(split: Split, scores: Sequence[float]) -> list[EnvironmentRow]:
    """The rows of a split, in the order of its posts; posts without a finite score are noted by id.

    Raises DataError when no post is left.
    """
    rows = []
    for candidate, score in zip(split.candidates, scores, strict=True):
        if math.isfinite(score):
            rows.append(EnvironmentRow(candidate.id, candidate.prompt_ids, candidate.cut_tokens, score))
        else:
            split.left_out[candidate.id] = "the reference's score is not finite"
    if not rows and (split.posts or split.name == "train"):
        reasons = "; ".join(sorted(set(split.left_out.values()))) or "there are none"
        raise DataError(
            f"no post of the {split.name} split can be used ({split.posts} read): {reasons}; "
            "look at prompt.max_prompt_tokens, the data and the reward model"
        )
    return rows


def report(split: Split, rows: Sequence[EnvironmentRow]) -> None:
    """Say what was left out and what is there."""
    for post_id, reason in list(split.left_out.items())[:LISTED]:
        logger.warning("left out split=%s post=%s: %s", split.name, post_id, reason)
    if len(split.left_out) > LISTED:
        logger.warning("left out split=%s: %d more, see summary.json", split.name, len(split.left_out) - LISTED)
    logger.info("environment split=%s posts=%d prompts=%d", split.name, split.posts, len(rows))


def publish(stage: StageDir, rows: Mapping[str, Sequence[EnvironmentRow]], summary: Mapping[str, Any]) -> None:
    """Make the environment and its summary final."""
    with stage.publish(0, final=True) as directory:
        for name in SPLITS:
            write_environment(directory, name, rows[name])
        (directory / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def summarise(split: Split, rows: Sequence[EnvironmentRow]) -> dict[str, Any]:
    """Counts and the mean score of a split, for summary.json."""
    return {
        "posts": split.posts,
        "duplicates": split.duplicates,
        "prompts": len(rows),
        "cut_prompts": sum(row.cut_tokens > 0 for row in rows),
        "cut_references": split.cut_references,
        "mean_reference_score": fmean(row.reference_score for row in rows) if rows else None,
        "left_out": [{"id": post_id, "reason": reason} for post_id, reason in split.left_out.items()],
    }


def _check_length(prompt: PromptConfig, positions: int | None) -> None:
    if positions is not None and prompt.max_sequence_tokens > positions:
        raise ConfigError(
            f"prompt.max_prompt_tokens={prompt.max_prompt_tokens} and "
            f"prompt.max_response_tokens={prompt.max_response_tokens} together are more than the reward model's "
            f"{positions} positions; lower them by {prompt.max_sequence_tokens - positions}"
        )
