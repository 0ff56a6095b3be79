"""Load a run: judge what it has published, verify it, load it, and warm it up.

Nothing here knows of requests. All of it blocks, for minutes with large models: call it in a thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.devices import choose_device, choose_dtype
from app.memory import ROOM_REMEDY, NoRoom, Workload, check_room, model_need, total_need
from app.published import ModelName, Published, describe, model_names, published, verify_files, verify_weights
from app.schemas import ModelInfo
from app.settings import Settings
from app.warm_up import warm_up_policy, warm_up_scorer
from rlhf import cgroups
from rlhf.errors import PrerequisiteError
from rlhf.generation import BuiltinEngine, Engine
from rlhf.model_files import file_digests
from rlhf.models import load_policy, load_reward_model
from rlhf.scoring import Scorer
from rlhf.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that is ready to write.

    A prompt may have max_prompt_tokens and a summary max_new_tokens; positions is None where the model sets no limit.
    """

    info: ModelInfo
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_new_tokens: int
    positions: int | None


@dataclass(frozen=True)
class LoadedReward:
    """A reward model that is ready to score; it knows the token ids below `vocabulary`."""

    info: ModelInfo
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    vocabulary: int


@dataclass(frozen=True)
class LoadedRun:
    """All that is served. directories holds what each model was loaded from, as `published` gave it."""

    policies: Mapping[str, LoadedPolicy]
    reward: LoadedReward
    directories: Mapping[str, Path]


def load_run(settings: Settings, *, on_phase: Callable[[str], None], beside: bool = False) -> LoadedRun:
    """Load what `final` names now; when it moves on during that, and so fails, what it names then, once.

    beside: another run is being served meanwhile, for whose caches room is left. on_phase hears in words what is
    being done. Raises PrerequisiteError for a model that is missing, damaged or unfit, ConfigError for a device
    or an engine that is not there, NoRoom for too little memory.
    """
    # Half of the cores, since a policy and the reward model work at the same time.
    cores = cgroups.usable_cores(cgroups.CGROUPS, cgroups.MEMBERSHIP)
    torch.set_num_threads(settings.threads or max(1, cores // 2))
    directories = published(settings)
    try:
        return _load(settings, directories, on_phase=on_phase, beside=beside)
    except PrerequisiteError as error:
        newer = published(settings)
        if newer == directories:
            raise
        logger.warning("what final names has changed while it was loaded; loading that: %s", error)
    # Outside of the handler, whose traceback would keep the first attempt's models in memory.
    return _load(settings, newer, on_phase=on_phase, beside=beside)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A model, and where and how it is to run."""

    model: Published
    workload: Workload

    def info(self, engine: str | None) -> ModelInfo:
        """What callers are told of it."""
        model, is_policy = self.model, engine is not None
        return ModelInfo(
            id=model.name,
            run=model.run,
            stage=model.name,
            step=model.step,
            prompt_version=model.prompt_version,
            parameters=model.parameters,
            dtype=str(self.workload.dtype).removeprefix("torch."),
            device=str(self.workload.device),
            checksum=model.checksum,
            engine=engine,
            max_prompt_tokens=model.max_prompt_tokens,
            max_new_tokens=model.max_new_tokens if is_policy else None,
        )


def _load(
    settings: Settings, directories: Mapping[str, Path], *, on_phase: Callable[[str], None], beside: bool
) -> LoadedRun:
    on_phase("looking at what is to be loaded")
    plans = [_plan(settings, name, directories[name]) for name in model_names(settings)]
    needs = [model_need(plan.model.config, plan.model.parameters, plan.workload) for plan in plans]
    check_room(total_need(needs, beside=beside))

    *policy_plans, reward_plan = plans
    policies: dict[str, LoadedPolicy] = {}
    try:
        for plan in policy_plans:
            policies[plan.model.name] = _load_policy(plan, settings, on_phase)
        reward = _load_reward(reward_plan, settings, on_phase)
        _check_tokenizers(policies, reward)
    except BaseException as error:
        for policy in policies.values():
            policy.engine.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise NoRoom(f"a device ran out of memory while the models were loaded; {ROOM_REMEDY}") from error
        raise
    return LoadedRun(policies=policies, reward=reward, directories=directories)


def _plan(settings: Settings, name: ModelName, directory: Path) -> _Plan:
    model = describe(name, directory, run=settings.run_dir.resolve().name)
    is_policy = name != "reward"
    if is_policy:
        device = choose_device("APP_POLICY_DEVICE", settings.policy_device)
    else:
        device = choose_device("APP_REWARD_DEVICE", settings.reward_device)
    workload = Workload(
        device=device,
        dtype=choose_dtype(settings.precision, device),
        sequences=settings.slots if is_policy else 0,
        positions=model.own_tokens + model.max_prompt_tokens + model.max_new_tokens,
        batch_tokens=settings.prefill_tokens if is_policy else settings.score_batch_tokens,
    )
    return _Plan(model=model, workload=workload)


def _load_policy(plan: _Plan, settings: Settings, on_phase: Callable[[str], None]) -> LoadedPolicy:
    model = plan.model
    on_phase(f"verifying {model.name}")
    verify_files(model, weights=settings.engine != "builtin")
    on_phase(f"loading {model.name}")
    tokenizer = _load_tokenizer(model)
    loaded = LoadedPolicy(
        info=plan.info(settings.engine),
        engine=_open_engine(plan, settings, tokenizer),
        tokenizer=tokenizer,
        max_prompt_tokens=model.max_prompt_tokens,
        max_new_tokens=model.max_new_tokens,
        positions=model.positions,
    )
    on_phase(f"warming up {model.name}")
    warm_up_policy(
        loaded.engine,
        tokenizer,
        slots=settings.slots,
        max_prompt_tokens=model.max_prompt_tokens,
        max_new_tokens=model.max_new_tokens,
    )
    logger.info("loaded model=%s step=%d path=%s", model.name, model.step, model.directory)
    return loaded


def _load_reward(plan: _Plan, settings: Settings, on_phase: Callable[[str], None]) -> LoadedReward:
    model, workload = plan.model, plan.workload
    on_phase(f"verifying {model.name}")
    verify_files(model, weights=False)
    on_phase(f"loading {model.name}")
    tokenizer = _load_tokenizer(model)
    network = load_reward_model(model.directory, dtype=workload.dtype, device=workload.device)
    _settle(network, model)
    scorer = Scorer(network, batch_tokens=settings.score_batch_tokens)
    on_phase(f"warming up {model.name}")
    warm_up_scorer(scorer, tokenizer, max_tokens=model.max_prompt_tokens + model.max_new_tokens)
    logger.info("loaded model=%s step=%d path=%s", model.name, model.step, model.directory)
    vocabulary = network.get_input_embeddings().num_embeddings
    return LoadedReward(plan.info(None), scorer, tokenizer, model.positions, vocabulary)


def _open_engine(plan: _Plan, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Engine:
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    directory, workload = plan.model.directory, plan.workload
    if settings.engine == "builtin":
        network = load_policy(directory, dtype=workload.dtype, device=workload.device)
        _settle(network, plan.model)
        return BuiltinEngine(network, eos_id=eos_id, pad_id=pad_id)
    from rlhf.vllm_engine import VllmEngine

    return VllmEngine(
        directory,
        eos_id=eos_id,
        pad_id=pad_id,
        slots=settings.slots,
        device=str(workload.device),
        dtype=workload.dtype,
        max_sequence_tokens=workload.positions,
    )


def _settle(network: PreTrainedModel, model: Published) -> None:
    """Freeze the weights, and refuse those that are not what was published, or not numbers."""
    verify_weights(model, file_digests(network))
    network.requires_grad_(False)
    for name, weight in network.named_parameters():
        if not _is_finite(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise PrerequisiteError(
                f"{model.directory}: {name} is not finite in {dtype}; train {model.name} again"
                + (", or set APP_PRECISION=float32" if weight.dtype != torch.float32 else "")
            )


def _is_finite(weight: Tensor) -> bool:
    """Whether there is neither a NaN nor an infinity, in one pass: either shows in the smallest or the largest."""
    return weight.numel() == 0 or all(math.isfinite(extreme) for extreme in weight.aminmax())


def _load_tokenizer(model: Published) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; PrerequisiteError where it has tokens that the model does not."""
    tokenizer = load_tokenizer(model.directory, key=model.name)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= (size := model.config.get_text_config().vocab_size):
        raise PrerequisiteError(
            f"{model.directory}: token {token!r} has id {number}, outside the model's vocabulary of {size}; "
            "put the tokenizer there that the model was trained with"
        )
    return tokenizer


def _check_tokenizers(policies: Mapping[str, LoadedPolicy], reward: LoadedReward) -> None:
    """What a policy wrote is scored as the very tokens that it wrote, as in PPO; so both must mean the same by them."""
    theirs = reward.tokenizer
    for name, policy in policies.items():
        ours = policy.tokenizer
        if ours.get_vocab() != theirs.get_vocab() or ours.eos_token_id != theirs.eos_token_id:
            raise PrerequisiteError(
                f"the tokenizers of {name} and reward differ, so the reward model would read other words than "
                "were written; train the reward model on this run's SFT policy"
            )
