"""PPO's look at its policy: summaries of held-out posts, what they score, and whether this policy is the best yet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rlhf.advantages import k3
from rlhf.config import Config
from rlhf.environment import EnvironmentRow
from rlhf.exchange import share_out
from rlhf.overlap import one_behind, scoring_ahead
from rlhf.oversight import Oversight
from rlhf.ppo_setup import EVALUATION, Learner, chances
from rlhf.prompt import decode_response
from rlhf.rollout import Rollout
from rlhf.runtime import from_all
from rlhf.telemetry import Stopwatch

SUMMED = ("reward", "score", "kl", "response_tokens", "ended")


class Progressing(Protocol):
    """Who trains a policy, and remembers the highest reward so far."""

    config: Config
    best_reward: float


@dataclass(frozen=True)
class Seen:
    """A held-out post's numbers, by the names of SUMMED, and its line in the table of samples, if it has one there."""

    place: int
    numbers: dict[str, float]
    line: str


def evaluate(learner: Learner, rows: list[EnvironmentRow], oversight: Oversight) -> dict[str, float]:
    """Step 6: summaries of held-out posts, sampled with the same chances each time, and a table of some."""
    config, accelerator = learner.config, learner.accelerator
    processes, chunk = accelerator.num_processes, config.ppo.rollout_chunk
    rows = sorted(rows, key=lambda row: (len(row.prompt_ids), row.id))
    places = share_out(len(rows), rank=accelerator.process_index, processes=processes)
    with learner.strategy.whole(), scoring_ahead(learner.scorer, heed=oversight.heed) as score:
        learner.sampler_ready()

        def chunks() -> Iterator[Callable[[], list[Rollout]]]:
            # As many on each process, the last of some perhaps empty: they ask together whether to stop.
            for start in range(0, -(-len(rows) // processes), chunk):
                oversight.heed()
                mine = places[start : start + chunk]
                chances_BR, posts = chances(learner, mine, EVALUATION), [rows[place] for place in mine]
                yield learner.collector.begin(posts, chances_BR=chances_BR, score=score, watch=Stopwatch())

        # Looked at one by one: a rollout holds more than is kept of it.
        rollouts = (rollout for finished in one_behind(chunks()) for rollout in finished)
        seen = [look(learner, place, rollout) for place, rollout in zip(places, rollouts, strict=True)]
    seen = sorted((one for theirs in from_all(seen) for one in theirs), key=lambda one: one.place)
    if accelerator.is_main_process:
        lines = [one.line for one in seen[: config.ppo.sample_table_posts]]
        learner.stage.write_text(f"samples/step-{learner.iteration:08d}.jsonl", "".join(lines))
    return {f"ppo/eval_{name}": sum(one.numbers[name] for one in seen) / len(seen) for name in SUMMED}


def look(learner: Learner, place: int, rollout: Rollout) -> Seen:
    """What an evaluation keeps of a rollout."""
    numbers = {
        "reward": rollout.score - rollout.row.reference_score * (learner.config.ppo.reward == "delta"),
        "score": rollout.score,
        "kl": float(k3(rollout.reference_logprobs_R, rollout.logprobs_R).sum()),
        "response_tokens": float(len(rollout.response_R)),
        "ended": float(rollout.ended),
    }
    line = ""
    if place < learner.config.ppo.sample_table_posts:
        summary = decode_response(learner.tokenizer, rollout.response_R.tolist())
        line = sample_line(learner.tokenizer, rollout.row, summary, rollout.score)
    return Seen(place, numbers, line)


def sample_line(tokenizer: PreTrainedTokenizerBase, post: EnvironmentRow, summary: str, score: float) -> str:
    """A line of the table of samples: a held-out post, its summary and scores."""
    row = {
        "id": post.id,
        "prompt": tokenizer.decode(post.prompt_ids),
        "summary": summary,
        "score": score,
        "reference_score": post.reference_score,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def is_best(progress: Progressing, held_out: Mapping[str, float]) -> bool:
    """Whether this policy has the highest held-out reward of those within the KL budget, of which note is taken."""
    reward = held_out["ppo/eval_reward"]
    within = held_out["ppo/eval_kl"] <= progress.config.ppo.kl_budget
    if not (within and math.isfinite(reward) and reward > progress.best_reward):
        return False
    progress.best_reward = reward
    return True
