"""trlX's settings in our terms: key by key, with a remark wherever the meaning changes. Needs no trlX.

What trlX's keys mean is read from CarperAI/trlx at 3340c2f: trlx/data/configs.py, trlx/models/modeling_ppo.py and the
trainers in trlx/trainer/.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf.errors import ConfigError
from rlhf.trlx.translation import ABSENT, Translation

MIN_PROMPT_TOKENS = 16
_OFF = (None, False, 0, "", "ignored", "none", "None", "False")


def translate(source: dict[str, Any], *, processes: int) -> Translation:
    """A trlX configuration, flat and of today's layout, in our terms.

    processes is how many trlX was started on: its batch sizes are those of one.
    Raises ConfigError for a configuration of another method than PPO and SFT.
    """
    translation = Translation(dict(source), processes)
    method = str(translation.take("method.name")).lower()
    if method not in ("ppoconfig", "sftconfig"):
        raise ConfigError(f"method.name={method} has no counterpart here; PPOConfig and SFTConfig have")
    if translation.take("model.model_arch_type", "causal") != "causal":
        raise ConfigError("model.model_arch_type=seq2seq has no counterpart here; only causal language models have")
    translation.source.pop("train.pipeline", None)
    translation.source.pop("train.trainer", None)
    if (seed := translation.take("train.seed", None)) is not None:
        translation.put("seed", seed)
    (_ppo if method == "ppoconfig" else _sft)(translation)
    translation.rest()
    return translation


def _ppo(translation: Translation) -> None:
    _model(translation, "trlX begins PPO with this model; here stage `sft` begins with it")
    _lengths(translation)
    steps = _batches(translation)
    _optimizer(translation, "ppo")
    _layers(translation)
    _kl(translation)
    _rewards(translation)
    for theirs, ours in (("gamma", "gamma"), ("lam", "lam"), ("cliprange", "clip_ratio"), ("vf_coef", "vf_coef")):
        translation.put(f"ppo.{ours}", translation.number(f"method.{theirs}"))
    translation.put("ppo.clip_value", translation.number("method.cliprange_value"))
    for theirs, ours in (("eval_interval", "eval_every_iterations"), ("checkpoint_interval", "save_every_iterations")):
        interval = translation.count(f"train.{theirs}")
        translation.put(
            f"ppo.{ours}", max(round(interval / steps), 1), f"train.{theirs}={interval} counts optimiser steps"
        )


def _sft(translation: Translation) -> None:
    _model(translation, "")
    _lengths(translation)
    batch, micro = _batch(translation)
    translation.put("sft.batch_size", batch, _global(translation.processes))
    translation.put("sft.micro_batch_size", micro)
    translation.put("sft.epochs", translation.number("train.epochs"))
    translation.put("sft.max_steps", translation.count("train.total_steps", None))
    translation.put("sft.eval_every_steps", translation.count("train.eval_interval"))
    translation.put("sft.save_every_steps", translation.count("train.checkpoint_interval"))
    translation.put(
        "sft.loss_on",
        "all",
        "as trlX does with samples that are one text; of pairs of prompt and output only the output",
    )
    _optimizer(translation, "sft")
    if translation.number("model.num_layers_unfrozen", -1) != -1:
        translation.lost.append("model.num_layers_unfrozen: SFT trains all weights")


def _model(translation: Translation, remark: str) -> None:
    path = translation.take("model.model_path")
    translation.put("model.base", path, remark)
    tokenizer = translation.take("tokenizer.tokenizer_path", path)
    if tokenizer != path:
        translation.put("model.tokenizer", tokenizer, "empty: the model's own")


def _lengths(translation: Translation) -> None:
    """seq_length is prompt and response together; a response's length is one of generation's arguments."""
    sequence = translation.count("train.seq_length")
    response = translation.count("method.gen_kwargs.max_new_tokens", None)
    if response is not None:
        translation.put("prompt.max_response_tokens", response, "EOS included")
    if response is None or sequence - response < MIN_PROMPT_TOKENS:
        translation.lose("method.gen_kwargs.max_length", "it counts the prompt, too")
        missing = "the response's length" if response is None else "room for a prompt"
        translation.lost.append(f"train.seq_length={sequence} and {missing}: see to prompt.* by hand")
    else:
        remark = f"train.seq_length={sequence} less the response"
        translation.put("prompt.max_prompt_tokens", sequence - response, remark)
    for key, neutral in (("top_k", (0,)), ("top_p", (1,)), ("do_sample", (True,))):
        name = f"method.gen_kwargs.{key}"
        if translation.source.get(name, ABSENT) in neutral:
            translation.take(name)
        elif key == "top_k" and name not in translation.source:
            translation.lost.append(f"{name} is not given, for which transformers took 50: here it is never used")
        translation.lose(name, "summaries are drawn from the whole distribution")
    if (temperature := translation.number("method.gen_kwargs.temperature", None)) not in (None, 1):
        translation.put("ppo.temperature", temperature, "of log-probabilities, too, which trlX takes at 1")
    for key in [key for key in translation.source if key.startswith("method.gen_")]:
        translation.lose(key, "an argument of transformers' generation")


def _batch(translation: Translation) -> tuple[int, int]:
    """The global batch of an optimiser step, and what one process takes in a forward pass."""
    batch = translation.count("train.batch_size")
    micro = translation.count("train.minibatch_size", None) or batch
    return batch * translation.processes, micro


def _batches(translation: Translation) -> int:
    """Rollouts, minibatches and iterations; gives the optimiser steps of an iteration."""
    batch, micro = _batch(translation)
    wanted, chunk = translation.count("method.num_rollouts"), translation.count("method.chunk_size", 0)
    chunk = chunk or wanted
    # trlX samples whole chunks until it has enough; ours also need whole minibatches.
    rollouts = -(-wanted // chunk) * chunk * translation.processes
    whole = math.lcm(chunk, batch)
    rounded = -(-rollouts // whole) * whole
    remark = _global(translation.processes)
    if rounded != wanted * translation.processes:
        remark = f"{wanted} a process, brought up to whole chunks and minibatches"
    translation.put("ppo.rollouts_per_iteration", rounded, remark)
    translation.put("ppo.rollout_chunk", chunk, "of one process")
    translation.put("ppo.minibatch_size", batch, _global(translation.processes))
    summed = "trlX sums the gradients of an optimiser step's parts, here they are averaged"
    translation.put("ppo.micro_batch_size", micro, summed if micro * translation.processes != batch else "")
    inner = translation.count("method.ppo_epochs")
    translation.put("ppo.inner_epochs", inner)
    steps = inner * rounded // batch
    epochs = translation.count("train.epochs")
    total = translation.count("train.total_steps", None) or epochs * steps
    iterations = min(epochs, -(-total // steps))
    translation.put(
        "ppo.iterations",
        iterations,
        f"the sooner of train.epochs={epochs} iterations and train.total_steps={total} optimiser steps, {steps} each",
    )
    return steps


def _optimizer(translation: Translation, stage: str) -> None:
    """AdamW and its schedule; trlX clips gradients only where DeepSpeed's file says so."""
    prefix = f"{stage}.optimizer"
    name = str(translation.take("optimizer.name", "adamw")).lower()
    if name != "adamw":
        translation.lost.append(f"optimizer.name={name}: the optimiser is AdamW")
    rate = translation.number("optimizer.kwargs.lr")
    translation.put(f"{prefix}.learning_rate", rate)
    betas = translation.take("optimizer.kwargs.betas", [0.9, 0.999])
    translation.put(f"{prefix}.betas", list(betas) if isinstance(betas, tuple | list) else betas)
    translation.put(f"{prefix}.eps", translation.number("optimizer.kwargs.eps", 1e-8))
    translation.put(f"{prefix}.weight_decay", translation.number("optimizer.kwargs.weight_decay", 0.01))
    clip = translation.number("train.grad_clip", 1.0)
    translation.put(f"{prefix}.max_grad_norm", clip, "trlX clips only by DeepSpeed's gradient_clipping")
    translation.put(f"{prefix}.warmup_steps", translation.number("train.lr_ramp_steps", 0))
    _schedule(translation, stage, rate)


def _schedule(translation: Translation, stage: str, rate: float) -> None:
    prefix = f"{stage}.optimizer"
    name, kwargs = str(translation.take("scheduler.name", "cosine_annealing")).lower(), "scheduler.kwargs."
    if name == "cosine_annealing":
        lowest, steps = translation.number(f"{kwargs}eta_min", 0), translation.number(f"{kwargs}T_max", None)
        shape = "constant" if lowest == rate else "cosine"
    elif name == "linear" and translation.number(f"{kwargs}start_factor", 1 / 3) == 1:
        lowest = rate * translation.number(f"{kwargs}end_factor", 1)
        steps, shape = translation.number(f"{kwargs}total_iters", 5), "linear"
    else:
        translation.lost.append(f"scheduler.name={name} in this form: the learning rate is constant")
        for key in [key for key in translation.source if key.startswith(kwargs)]:
            translation.lose(key, "no such schedule")
        lowest, steps, shape = rate, None, "constant"
    remark = "a cosine that falls nowhere" if name == "cosine_annealing" and shape == "constant" else ""
    translation.put(f"{prefix}.schedule", shape, remark)
    translation.put(f"{prefix}.final_learning_rate", lowest)
    if shape != "constant" and stage == "ppo":
        translation.put("ppo.schedule_steps", steps, "then the rate stays where it is; trlX's cosine rises again")
    elif shape != "constant":
        translation.lost.append(f"{kwargs}T_max={steps}: SFT's schedule is as long as its training")


def _layers(translation: Translation) -> None:
    """How much of the policy is trained: the top blocks, or adapters."""
    unfrozen = translation.number("model.num_layers_unfrozen", -1)
    if unfrozen == -1:
        remark = "of the embeddings, too; trlX's -1 compares with a reference that lacks the first block"
        translation.put("ppo.unfrozen_layers", "all", remark)
    elif unfrozen == 0:
        translation.put(
            "ppo.unfrozen_layers", 1, "model.num_layers_unfrozen=0 trains no block, which is not possible here"
        )
    else:
        translation.put("ppo.unfrozen_layers", unfrozen)
    if translation.number("method.num_value_layers_unfrozen", 0):
        translation.lost.append(
            "method.num_value_layers_unfrozen: the value function is a head, or value_network: separate"
        )
    kind = translation.take("model.peft_config.peft_type", translation.take("model.peft_config", None))
    if kind is not None and str(kind).upper() == "LORA":
        translation.put("ppo.lora.rank", translation.count("model.peft_config.r", 8))
        translation.put("ppo.lora.alpha", translation.number("model.peft_config.lora_alpha", 8))
        if targets := translation.take("model.peft_config.target_modules", None):
            translation.put("ppo.lora.targets", [targets] if isinstance(targets, str) else list(targets))
    elif kind is not None:
        translation.lost.append(f"model.peft_config={kind!r}: of adapters there is LoRA only")
    for key in [key for key in translation.source if key.startswith("model.peft_config.")]:
        translation.lose(key, "no such setting of the adapters")


def _kl(translation: Translation) -> None:
    translation.put("ppo.init_kl_coef", translation.number("method.init_kl_coef"))
    target, horizon = translation.number("method.target", None), translation.count("method.horizon", 10_000)
    if target is None:
        translation.put("ppo.kl_controller", "fixed", "method.target is empty")
        return
    translation.put(
        "ppo.kl_controller", "adaptive", "moved once an iteration by its rollouts; trlX: each inner epoch by a batch"
    )
    translation.put("ppo.kl_target", target, "of the response's KL; trlX counts the prompt's tokens, too")
    translation.put("ppo.kl_horizon", horizon, "rollouts")


def _rewards(translation: Translation) -> None:
    translation.put(
        "ppo.reward", "absolute", "trlX's reward function is code; `delta` is what its summarize example does"
    )
    clip = translation.take("method.cliprange_reward", None)
    translation.put("ppo.clip_score", None if clip in _OFF else clip)
    scale = translation.take("method.scale_reward", None)
    if scale not in (*_OFF, "running"):
        translation.lost.append(
            f"method.scale_reward={scale!r}: scores are divided by their running deviation or not at all"
        )
    translation.put("ppo.scale_score", "running" if scale == "running" else "none")
    for key in ("method.ref_mean", "method.ref_std"):
        if translation.source.get(key, ABSENT) is None:
            translation.take(key)
        translation.lose(key, "goes with scale_reward: ref")


def _global(processes: int) -> str:
    each = "of one process" if processes == 1 else f"of each of {processes} processes"
    return f"of all processes together; trlX's was that {each}"
