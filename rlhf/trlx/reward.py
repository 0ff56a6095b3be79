"""What trlX asks the environment: its prompts as text, and a reward function that knows them by their post's id."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.config import PpoConfig
from rlhf.environment import EnvironmentRow
from rlhf.errors import ConfigError, RlhfError
from rlhf.prompt import normalize_text
from rlhf.scoring import Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A response as trlX gives it: the tokens it reads out of the text, EOS among them where it ended."""

    row: EnvironmentRow
    response_ids: list[int]
    summary: str
    score: float

    def ended(self, eos_id: int) -> bool:
        """Whether the response ended by itself."""
        return eos_id in self.response_ids


class RewardFunction:
    """Rewards trlX's responses: the reward model's score of prompt and response, as `ppo.reward` and its fellows say.

    Clipping and scaling are left to trlX. What was scored waits in `scored` for who wants the numbers.
    """

    def __init__(
        self, rows: Sequence[EnvironmentRow], *, ppo: PpoConfig, tokenizer: PreTrainedTokenizerBase, scorer: Scorer
    ) -> None:
        self.scored: list[Scored] = []
        self._ppo, self._tokenizer, self._scorer = ppo, tokenizer, scorer
        self._rows = {row.id: row for row in rows}

    def __call__(
        self, samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any, post_id: list[str]
    ) -> list[float]:
        """One reward a response. Raises RlhfError for a post that is not in the environment, or has another prompt.

        Source of the arguments: CarperAI/trlx, trlx/trainer/accelerate_ppo_trainer.py, make_experience.
        """
        rows = [self._row(name, prompt) for name, prompt in zip(post_id, prompts, strict=True)]
        responses = [tokens_of(self._tokenizer, output) for output in outputs]
        sequences = [row.prompt_ids + response for row, response in zip(rows, responses, strict=True)]
        scores = self._scorer.score(sequences).tolist()
        fresh = [
            Scored(row, response, normalize_text(self._tokenizer.decode(response, skip_special_tokens=True)), score)
            for row, response, score in zip(rows, responses, scores, strict=True)
        ]
        self.scored += fresh
        return [self.reward(scored) for scored in fresh]

    def reward(self, scored: Scored) -> float:
        """What a response earns before trlX clips and scales it."""
        ppo, reward = self._ppo, scored.score
        if ppo.reward == "delta":
            reward -= scored.row.reference_score
        if not scored.ended(self._tokenizer.eos_token_id):
            reward = (reward if ppo.missing_eos_score is None else ppo.missing_eos_score) - ppo.missing_eos_penalty
        return reward

    def take(self) -> list[Scored]:
        """What was scored since the last call."""
        taken, self.scored = self.scored, []
        return taken

    def _row(self, post_id: str, prompt: str) -> EnvironmentRow:
        row = self._rows.get(post_id)
        if row is None:
            raise RlhfError(f"trlX asked for the reward of post {post_id[:64]}, which is not in the environment")
        if prompt != prompt_text(self._tokenizer, row):
            raise RlhfError(f"trlX asked for the reward of post {row.id[:64]} under another prompt than its own")
        return row


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens that trlX reads out of a text, in which a special token's name is that token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_text(tokenizer: PreTrainedTokenizerBase, row: EnvironmentRow) -> str:
    """A prompt as trlX decodes it."""
    text: str = tokenizer.decode(row.prompt_ids, skip_special_tokens=True)
    return text


def readable_rows(rows: Sequence[EnvironmentRow], tokenizer: PreTrainedTokenizerBase) -> list[EnvironmentRow]:
    """The rows whose prompt trlX, which takes text, turns back into the same tokens; the others are counted and left.

    Raises ConfigError when there are none.
    """
    kept = [row for row in rows if tokens_of(tokenizer, prompt_text(tokenizer, row)) == row.prompt_ids]
    if not kept:
        raise ConfigError(
            f"ppo.engine=trlx: trlX decodes prompts and tokenises them again, and with {type(tokenizer).__name__} none "
            f"of {len(rows)} comes back as it was; use ppo.engine: builtin"
        )
    if len(kept) < len(rows):
        logger.warning(
            "trlX would read %d of %d prompts as other tokens; they are left out", len(rows) - len(kept), len(rows)
        )
    return kept


def trlx_prompts(rows: Sequence[EnvironmentRow], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Prompts for `trlx.train`; what stands beside the text goes to the reward function."""
    return [{"prompt": prompt_text(tokenizer, row), "post_id": row.id} for row in rows]


def whole_chunks(rows: list[EnvironmentRow], chunk: int) -> list[EnvironmentRow]:
    """As many rows as fill chunks: of a smaller last chunk trlX would make too many rollouts in an iteration."""
    if len(rows) < chunk:
        return (rows * -(-chunk // len(rows)))[:chunk]
    return rows[: len(rows) // chunk * chunk]
