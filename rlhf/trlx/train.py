"""The PPO stage run by trlX itself, from our SFT policy, environment and reward model to our `final`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.environment import EnvironmentRow, load_environment
from rlhf.errors import ConfigError, StopRequested
from rlhf.model_files import open_config
from rlhf.models import load_reward_model
from rlhf.oversight import Interrupted, Oversight
from rlhf.processes import process_count
from rlhf.runtime import prepare_runtime
from rlhf.scoring import Scorer
from rlhf.stopping import StopSignal
from rlhf.storage import unfinished_name
from rlhf.telemetry import Metrics, Progress
from rlhf.tokenizer import load_tokenizer
from rlhf.trlx.compat import REFERENCES, check_versions, mended
from rlhf.trlx.export import read_numbers, trlx_copy
from rlhf.trlx.ledger import Ledger
from rlhf.trlx.reward import RewardFunction, readable_rows, trlx_prompts, whole_chunks
from rlhf.trlx.settings import check_settings, trlx_settings, unfrozen_layers
from rlhf.watchdog import Watchdog

logger = logging.getLogger(__name__)

UNHEEDED = "ppo.optimizer.max_grad_norm, ppo.max_kl, runtime.max_bad_steps"
"""Settings without a value that would mean what trlX does."""


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Have trlX train from the last checkpoint, or from SFT, through `ppo.iterations`, and publish `final`.

    Raises ConfigError where trlX is not installed or a setting has no counterpart in it, PrerequisiteError when SFT,
    the reward model or the environment is missing, StopRequested after a signal, with the state saved.
    """
    check_settings(config, processes=process_count())
    check_versions()
    logger.warning("trlX does not heed %s", UNHEEDED)
    sft, reward = (StageDir(stage.run_dir, name).final() for name in ("sft", "reward"))
    layers = _layers(sft)
    unfrozen_layers(config, layers)
    device = prepare_runtime(config.runtime, seed=config.seed)
    tokenizer = load_tokenizer(sft, key="sft/final")
    train, valid = _rows(config, stage, tokenizer)
    rewards = RewardFunction(
        [*train, *valid], ppo=config.ppo, tokenizer=tokenizer, scorer=_scorer(config, reward, device)
    )
    latest = stage.latest()
    saved = latest[1] if latest else None
    done = read_numbers(saved)["iteration"] if saved else 0
    work = stage.room / unfinished_name("trlx")  # cleared with the room
    settings = trlx_settings(config, model_dir=trlx_copy(sft, work / "sft"), work_dir=work, layers=layers, done=done)
    with (
        stop.deferred(),
        mended(cpu=device.type == "cpu"),
        Watchdog(config.runtime.hang_after_seconds) as watchdog,
        Metrics(stage, tensorboard=config.runtime.tensorboard, start_step=done + 1 if saved else 0) as metrics,
        Progress(stage, config.ppo.iterations, "iterations", done=done) as progress,
    ):
        oversight = Oversight(stop, watchdog)
        ledger = Ledger(config, stage, rewards, tokenizer, metrics, progress, oversight, saved=saved)
        try:
            _train(settings, ledger, trlx_prompts(train, tokenizer), trlx_prompts(valid, tokenizer))
        except Interrupted:
            ledger.leave()
            raise StopRequested("stopped on request, the state is saved; run the same command again") from None
        ledger.close()


def _train(
    settings: dict[str, object], ledger: Ledger, prompts: list[dict[str, str]], eval_prompts: list[dict[str, str]]
) -> None:
    """trlX's own `train`, with our trainer, which the import puts on its list."""
    import trlx
    from trlx.data.configs import TRLConfig

    import rlhf.trlx.trainer  # noqa: F401

    config = TRLConfig.from_dict(settings)
    config.train.trainer_kwargs = {"ledger": ledger}
    trlx.train(reward_fn=ledger.reward_function, prompts=prompts, eval_prompts=eval_prompts, config=config)


def _scorer(config: Config, reward: Path, device: torch.device) -> Scorer:
    model = load_reward_model(reward, device=device)
    return Scorer(model, batch_tokens=config.prepare.batch_tokens)


def _layers(sft: Path) -> int:
    """The number of the policy's blocks. Raises ConfigError for a model whose reference we cannot mend in trlX."""
    model = open_config(sft)[0]
    architecture = (model.architectures or ["a model of no name"])[0]
    if architecture not in REFERENCES:
        raise ConfigError(
            f"ppo.engine=trlx works with {' and '.join(REFERENCES)}, and sft/final is {architecture}; "
            "use ppo.engine: builtin"
        )
    return int(model.num_hidden_layers)


def _rows(
    config: Config, stage: StageDir, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[EnvironmentRow], list[EnvironmentRow]]:
    """Training prompts in whole chunks, and held-out ones."""
    environment = StageDir(stage.run_dir, "prepare").final()
    train = readable_rows(load_environment(environment, "train"), tokenizer)
    valid = readable_rows(load_environment(environment, "valid")[: config.ppo.eval_posts], tokenizer)
    return whole_chunks(train, config.ppo.rollout_chunk), valid
