"""Our configuration as trlX's, and what of ours trlX has no counterpart for. Needs no trlX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config import Config
from rlhf.errors import ConfigError

TRAINER = "RlhfPpoTrainer"
"""Under this name `rlhf.trlx.trainer` is in trlX's list of trainers."""
_NEVER = 2**31


def check_settings(config: Config, *, processes: int) -> None:
    """Raise ConfigError for the first setting that trlX cannot follow, naming the key, the value and the remedy."""
    ppo = config.ppo
    total = ppo.total_optimizer_steps
    refused = (
        ("runtime.precision", config.runtime.precision, "float32"),
        ("ppo.value_network", ppo.value_network, "head"),
        ("ppo.lora.rank", ppo.lora.rank, None),
        ("ppo.deepspeed", ppo.deepspeed, None),
        ("ppo.sampler", ppo.sampler, "builtin"),
        ("ppo.reward_placement", ppo.reward_placement, "colocated"),
        ("ppo.temperature", ppo.temperature, 1.0),
        ("ppo.stop_kl", ppo.stop_kl, None),
        ("ppo.optimizer.warmup_steps", ppo.optimizer.warmup_steps, 0),
    )
    for key, value, only in refused:
        if value != only:
            wanted = "empty" if only is None else only
            raise ConfigError(
                f"{key}={value} has no counterpart in trlX; leave it {wanted}, or use ppo.engine: builtin"
            )
    if ppo.schedule_steps is not None and ppo.schedule_steps < total and ppo.optimizer.schedule == "cosine":
        raise ConfigError(
            f"ppo.schedule_steps={ppo.schedule_steps} is shorter than the run's {total} steps, and trlX's cosine rises "
            "again after its end; leave it empty, or use ppo.engine: builtin"
        )
    if ppo.optimizer.final_learning_rate > ppo.optimizer.learning_rate:
        raise ConfigError(
            f"ppo.optimizer.final_learning_rate={ppo.optimizer.final_learning_rate} is above learning_rate="
            f"{ppo.optimizer.learning_rate}, which trlX's schedules cannot do; use ppo.engine: builtin"
        )
    if processes > 1:
        raise ConfigError(f"ppo.engine=trlx runs as one process and {processes} were started; use ppo.engine: builtin")


def unfrozen_layers(config: Config, layers: int) -> int:
    """How many of a model's blocks trlX trains, for `num_layers_unfrozen`. Raises ConfigError for more than it has.

    Never trlX's -1 for all: it compares with a reference that lacks the first block, with a KL above 0 from the start.
    """
    wanted = config.ppo.unfrozen_layers
    if wanted == "all":
        return layers
    if wanted > layers:
        raise ConfigError(f"ppo.unfrozen_layers={wanted} is not between 1 and the model's {layers} blocks")
    return wanted


def trlx_settings(config: Config, *, model_dir: Path, work_dir: Path, layers: int, done: int = 0) -> dict[str, Any]:
    """What `TRLConfig.from_dict` reads, for the iterations after the first `done`.

    model_dir holds the model and its tokenizer, layers is the number of its blocks. trlX saves nothing by itself:
    `rlhf.trlx.ledger` does.
    """
    ppo = config.ppo
    left = config.ppo.iterations - done
    gen_kwargs = {
        "max_new_tokens": config.prompt.max_response_tokens,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
    }
    return {
        "train": {
            "seq_length": config.prompt.max_sequence_tokens,
            "epochs": left,
            "total_steps": left * ppo.optimizer_steps_per_iteration,
            "batch_size": ppo.minibatch_size,
            "minibatch_size": ppo.micro_batch_size,
            "eval_interval": ppo.eval_every_iterations * ppo.optimizer_steps_per_iteration,
            "checkpoint_interval": _NEVER,
            "checkpoint_dir": str(work_dir),
            "save_best": False,
            "save_optimizer": False,
            "pipeline": "PromptPipeline",
            "trainer": TRAINER,
            "tracker": None,
            # A run that goes on draws other prompts and samples than those before its stop.
            "seed": (config.seed + done) % 2**32,
        },
        "model": {
            "model_path": str(model_dir),
            "num_layers_unfrozen": unfrozen_layers(config, layers),
            "model_extra_configs": {"attn_implementation": "eager"},
        },
        "tokenizer": {"tokenizer_path": str(model_dir), "padding_side": "left", "truncation_side": "right"},
        "optimizer": _optimizer(config),
        "scheduler": _scheduler(config),
        "method": {
            "name": "PPOConfig",
            "num_rollouts": ppo.rollouts_per_iteration,
            "chunk_size": ppo.rollout_chunk,
            "ppo_epochs": ppo.inner_epochs,
            "init_kl_coef": ppo.init_kl_coef,
            "target": ppo.kl_target if ppo.kl_controller == "adaptive" else None,
            "horizon": ppo.kl_horizon,
            "gamma": ppo.gamma,
            "lam": ppo.lam,
            "cliprange": ppo.clip_ratio,
            "cliprange_value": ppo.clip_value,
            "vf_coef": ppo.vf_coef,
            "scale_reward": "running" if ppo.scale_score == "running" else None,
            "ref_mean": None,
            "ref_std": None,
            "cliprange_reward": ppo.clip_score,
            "gen_kwargs": gen_kwargs,
        },
    }


def _optimizer(config: Config) -> dict[str, Any]:
    optimizer = config.ppo.optimizer
    kwargs = {
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    return {"name": "adamw", "kwargs": kwargs}


def _scheduler(config: Config) -> dict[str, Any]:
    """The learning rate's course; a constant one is a cosine that ends where it begins, as in trlX's examples."""
    optimizer, steps = config.ppo.optimizer, config.ppo.schedule_steps or config.ppo.total_optimizer_steps
    if optimizer.schedule == "linear":
        share = optimizer.final_learning_rate / optimizer.learning_rate
        return {"name": "linear", "kwargs": {"start_factor": 1.0, "end_factor": share, "total_iters": steps}}
    lowest = optimizer.learning_rate if optimizer.schedule == "constant" else optimizer.final_learning_rate
    return {"name": "cosine_annealing", "kwargs": {"T_max": steps, "eta_min": lowest}}
