"""A finished run of tiny models, as the service meets it: an SFT policy, a PPO policy and a reward model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.models import stamp_prompt_version
from rlhf.pipeline import CONFIG_FILE
from tests.fakes import tiny_policy, tiny_reward_model
from tests.tiny_run import byte_tokenizer, tiny_config

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 96, 24
STEPS = {"sft": 3, "ppo": 5, "reward": 7}


def served_run(runs_dir: Path, *, seed: int = 0) -> Path:
    """The directory of a run, `runs_dir/served`, in which `sft`, `ppo` and `reward` have finished.

    The two policies differ, and differ again with another seed.
    """
    run_dir = runs_dir / "served"
    publish_policy(run_dir, "sft", step=STEPS["sft"], seed=2 * seed)
    publish_policy(run_dir, "ppo", step=STEPS["ppo"], seed=2 * seed + 1)
    publish_reward_model(run_dir, step=STEPS["reward"], seed=2 * seed)
    return run_dir


def publish_policy(run_dir: Path, stage: str, *, step: int, seed: int) -> Path:
    """Publish a policy as the stage's `final`; what was final before stays beside it."""
    return publish_model(run_dir, stage, tiny_policy(seed=seed), step=step)


def publish_reward_model(run_dir: Path, *, step: int, seed: int) -> Path:
    """Publish a reward model as `reward/final`; its published score is the logit minus 0.25."""
    return publish_model(run_dir, "reward", tiny_reward_model(tiny_policy(seed=seed), shift=0.25), step=step)


def publish_model(
    run_dir: Path, stage: str, model: PreTrainedModel, *, step: int, config: Config | None = None
) -> Path:
    """Publish any model with the byte tokenizer, as the stages do: PPO alone keeps its settings in the checkpoint."""
    settings = (config or tiny_config()).to_yaml()
    stamp_prompt_version(model)
    directory = StageDir(run_dir, stage)
    with directory.publish(step, final=True) as work:
        model.save_pretrained(work)
        byte_tokenizer().save_pretrained(work)
        if stage == "ppo":
            (work / CONFIG_FILE).write_text(settings, encoding="utf-8")
    (directory.path / CONFIG_FILE).write_text(settings, encoding="utf-8")
    return (directory.path / "final").resolve()
