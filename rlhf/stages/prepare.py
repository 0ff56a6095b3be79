"""PPO's environment: prompts tokenised once, and the score of each one's reference summary.

A score costs a pass of the reward model, so each is written down as soon as it is known; a killed
process loses one chunk. N sequences.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir, fingerprint, storage_errors, write_text_atomically
from rlhf.config import Config, PromptConfig
from rlhf.data import Example, load_examples
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.errors import ConfigError, DataError
from rlhf.models import load_reward_model
from rlhf.prompt import encode_prompt, encode_response
from rlhf.runtime import StopSignal, prepare_runtime, torch_dtype
from rlhf.scoring import Scorer
from rlhf.sequences import max_positions
from rlhf.telemetry import Progress
from rlhf.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
CHUNK = 256
"""Sequences scored between two looks at the stop signal, and two writes to disk."""
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


def run(config: Config, run_dir: Path, stop: StopSignal) -> None:
    """Tokenise the posts, score their references and publish `prepare/final`.

    Raises PrerequisiteError when fetch or reward has not finished, DataError when no post is left, and
    StopRequested after a signal, with the scores so far kept.
    """
    device = prepare_runtime(config.runtime, seed=config.seed)
    data = StageDir(run_dir, "fetch").final() / "data"
    reward, stage = StageDir(run_dir, "reward").final(), StageDir(run_dir, "prepare")

    # 1. Prompts and references become token ids, each post once.
    tokenizer = load_tokenizer(reward, key="reward/final")
    splits = [encode_split(tokenizer, name, load_examples(data, name), config.prompt) for name in SPLITS]

    # 2. Each prompt with its reference gets its score, once.
    model = load_reward_model(reward, dtype=torch_dtype(config.runtime.precision), device=device)
    _check_length(config.prompt, max_positions(model))
    scorer = Scorer(model, pad_id=tokenizer.pad_token_id, batch_tokens=config.prepare.batch_tokens)
    store = ScoreStore(stage.path / "scores.partial.jsonl", model=f"{fingerprint(reward)} {config.runtime.precision}")
    sequences = [candidate.sequence for split in splits for candidate in split.candidates]
    with Progress(stage.path, "prepare", len(sequences), "posts") as progress:
        score_all(scorer, sequences, store, stop=stop, progress=progress)

    # 3. Published: a row for each post whose reference has a score.
    rows = {split.name: environment_rows(split, store) for split in splits}
    for split in splits:
        report(split, rows[split.name])
    summary = {split.name: summarise(split, rows[split.name]) for split in splits}
    with stage.publish(0, final=True) as directory:
        for name in SPLITS:
            write_environment(directory, name, rows[name])
        (directory / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


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


class ScoreStore:
    """Scores on disk by what was scored: the token ids, the reward model and its precision.

    A line that a killed process left half-written is passed over and removed.
    """

    def __init__(self, path: Path, *, model: str) -> None:
        self._path = path
        self._model = model
        self._scores = _read_scores(path)
        # Rewritten, so that what is appended does not continue a torn line.
        write_text_atomically(path, "".join(_line(key, score) for key, score in self._scores.items()))

    def has(self, sequence: Sequence[int]) -> bool:
        """Whether this sequence was scored before."""
        return self._key(sequence) in self._scores

    def score(self, sequence: Sequence[int]) -> float:
        """The score of a sequence, which may be NaN or infinite."""
        return self._scores[self._key(sequence)]

    def add(self, sequences: Sequence[Sequence[int]], scores: Sequence[float]) -> None:
        """Remember scores, on disk before this returns."""
        new = {self._key(sequence): score for sequence, score in zip(sequences, scores, strict=True)}
        self._scores |= new
        with storage_errors(self._path.parent), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(key, score) for key, score in new.items()))

    def _key(self, sequence: Sequence[int]) -> str:
        return hashlib.sha256(f"{self._model} {list(sequence)}".encode()).hexdigest()


def score_all(
    scorer: Scorer, sequences: Sequence[list[int]], store: ScoreStore, *, stop: StopSignal, progress: Progress
) -> None:
    """Score what the store lacks, chunk by chunk, the longest first.

    A chunk is scored whole or not at all, and always in the same company: a continued run gets the
    same bits as one that was never stopped.
    """
    order = sorted(sequences, key=len, reverse=True)
    for start in range(0, len(order), CHUNK):
        stop.check()
        chunk = order[start : start + CHUNK]
        if not all(store.has(sequence) for sequence in chunk):
            store.add(chunk, scorer.score(chunk, allow_nonfinite=True).tolist())
        progress.update(start + len(chunk))


def environment_rows(split: Split, store: ScoreStore) -> list[EnvironmentRow]:
    """The rows of a split, in the order of its posts; posts without a finite score are noted by id.

    Raises DataError when no post is left.
    """
    rows = []
    for candidate in split.candidates:
        score = store.score(candidate.sequence)
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


def _line(key: str, score: float) -> str:
    return json.dumps({"key": key, "score": score if math.isfinite(score) else None}) + "\n"


def _read_scores(path: Path) -> dict[str, float]:
    """What can be read of a store; nothing where there is no file."""
    scores: dict[str, float] = {}
    if not path.is_file():
        return scores
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            scores[str(entry["key"])] = math.nan if entry["score"] is None else float(entry["score"])
        except (ValueError, KeyError, TypeError):
            logger.warning("passing over a damaged line of %s", path)
    return scores
