"""PPO's look at its policy: summaries of held-out posts, what they score, and whether this policy is the best yet."""

from __future__ import annotations

import json
import math

import torch

from rlhf.advantages import k3
from rlhf.environment import EnvironmentRow
from rlhf.oversight import Oversight
from rlhf.ppo_setup import EVALUATION, Learner
from rlhf.prompt import decode_response
from rlhf.rollout import Rollout
from rlhf.runtime import generator
from rlhf.telemetry import Stopwatch


def evaluate(learner: Learner, rows: list[EnvironmentRow], oversight: Oversight) -> dict[str, float]:
    """Step 6: summaries of held-out posts, sampled with the same chances each time, and a table of some."""
    config, accelerator = learner.config, learner.accelerator
    processes, rank = accelerator.num_processes, accelerator.process_index
    mine = sorted(rows, key=lambda row: (len(row.prompt_ids), row.id))[rank::processes]
    shown: list[Rollout] = []
    sums = dict.fromkeys(("reward", "score", "kl", "response_tokens", "ended", "posts"), 0.0)
    # As many chunks on each process, the last of some perhaps empty: they ask together whether to stop.
    for start in range(0, -(-len(rows) // processes), config.ppo.rollout_chunk):
        oversight.heed()
        rollouts = learner.collector.collect(
            mine[start : start + config.ppo.rollout_chunk],
            stream=generator(config.seed, EVALUATION, rank, start, device=learner.device),
            watch=Stopwatch(),
        )
        for rollout in rollouts:
            sums["reward"] += rollout.score - rollout.row.reference_score * (config.ppo.reward == "delta")
            sums["score"] += rollout.score
            sums["kl"] += float(k3(rollout.reference_logprobs_R, rollout.logprobs_R).sum())
            sums["response_tokens"] += len(rollout.response_R)
            sums["ended"] += rollout.ended
            sums["posts"] += 1
        shown += rollouts[: config.ppo.sample_table_posts - len(shown)]
    if accelerator.is_main_process:
        write_samples(learner, shown)
    totals = learner.sum_values({key: torch.tensor(value) for key, value in sums.items()})
    return {f"ppo/eval_{key}": total / totals["posts"] for key, total in totals.items() if key != "posts"}


def write_samples(learner: Learner, rollouts: list[Rollout]) -> None:
    """A table of held-out posts, their summaries and scores, one JSON line each."""
    lines = []
    for rollout in rollouts:
        row = {
            "id": rollout.row.id,
            "prompt": learner.tokenizer.decode(rollout.row.prompt_ids),
            "summary": decode_response(learner.tokenizer, rollout.response_R.tolist()),
            "score": rollout.score,
            "reference_score": rollout.row.reference_score,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    learner.stage.write_text(f"samples/step-{learner.iteration:08d}.jsonl", "".join(lines))


def is_best(learner: Learner, held_out: dict[str, float]) -> bool:
    """Whether this policy has the highest held-out reward of those within the KL budget."""
    reward = held_out["ppo/eval_reward"]
    within = held_out["ppo/eval_kl"] <= learner.config.ppo.kl_budget
    if not (within and math.isfinite(reward) and reward > learner.best_reward):
        return False
    learner.best_reward = reward
    return True
