"""Every setting of a run: frozen schemas with each key's meaning, unit, default and origin.

Unknown keys fail. What can be derived is a property. `rlhf/presets.py` reads files into these schemas, and
`docs/configuration.md` is generated from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

TRLX = "trlX summarize example"
NPLUS = "Huang et al. 2024"
OURS = ""


def setting(
    default: Any, meaning: str, *, unit: str = "", origin: str = OURS, may_change: bool = False, **constraints: Any
) -> Any:
    """Declare a key: meaning, unit, where its default comes from, whether a stage that has begun may change it."""
    extra: dict[str, Any] = {"unit": unit, "origin": origin, "may_change": may_change}
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: default, description=meaning, json_schema_extra=extra, **constraints)
    return Field(default, description=meaning, json_schema_extra=extra, **constraints)


DEEPSPEED = (
    "how many processes share the state of training: `zero2`, `zero2-offload`, `zero3`, `zero3-offload`, or the path "
    "of a DeepSpeed configuration (JSON); empty: each holds all of it (DDP)"
)


class Section(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DataConfig(Section):
    """Where posts and comparisons come from, and what is done about bad ones."""

    posts: str | tuple[str, ...] = setting(
        "CarperAI/openai_summarize_tldr",
        "posts with summaries: `synthetic`, a Hub name, or local .jsonl, .jsonl.gz, .csv, .parquet file(s)",
        origin=TRLX,
    )
    comparisons: str | tuple[str, ...] = setting(
        "CarperAI/openai_summarize_comparisons", "comparisons of two summaries: as `posts`", origin=TRLX
    )
    max_bad_fraction: float = setting(
        0.01, "share of unreadable rows above which `fetch` ends with exit code 65", ge=0, le=1
    )
    valid_fraction: float = setting(
        0.05, "share of posts held out for validation where the source has no such split", ge=0, lt=1
    )
    test_fraction: float = setting(
        0.05, "share of posts held out for the test where the source has no such split", ge=0, lt=1
    )
    min_comparison_words: int = setting(
        5, "a comparison with a summary shorter than this is dropped", unit="words", origin=TRLX, ge=1
    )
    max_train_posts: int | None = setting(None, "at most so many training posts", unit="posts", ge=1)
    max_valid_posts: int | None = setting(None, "at most so many validation posts", unit="posts", ge=1)
    max_test_posts: int | None = setting(None, "at most so many test posts", unit="posts", ge=1)
    max_train_comparisons: int | None = setting(None, "at most so many training pairs", unit="pairs", ge=1)
    max_valid_comparisons: int | None = setting(None, "at most so many held-out pairs", unit="pairs", ge=1)


class SyntheticConfig(Section):
    """The demo's world: posts with known facts, writers with bad habits, judges who err."""

    train_posts: int = setting(6000, "posts in the train split", unit="posts", ge=1)
    valid_posts: int = setting(200, "posts in the validation split", unit="posts", ge=1)
    test_posts: int = setting(400, "posts in the test split", unit="posts", ge=1)
    train_comparisons: int = setting(5000, "pairs to train the reward model on", unit="pairs", ge=1)
    valid_comparisons: int = setting(800, "held-out pairs", unit="pairs", ge=1)
    judge_error_rate: float = setting(0.1, "how often a judge prefers the worse summary", ge=0, lt=0.5)


class TinyModelConfig(Section):
    """The shape of the GPT-J that `model.base: tiny` creates with random weights."""

    layers: int = setting(4, "transformer blocks", ge=1)
    hidden: int = setting(128, "width", ge=8)
    heads: int = setting(4, "attention heads", ge=1)
    rotary_dim: int = setting(16, "rotary dimensions of a head", ge=2)
    vocab_size: int = setting(1024, "entries of the byte-level BPE trained on the train split", ge=260)
    initializer_range: float = setting(0.02, "standard deviation of the first random weights", gt=0)

    @model_validator(mode="after")
    def _shape_fits(self) -> TinyModelConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}")
        if self.rotary_dim > self.hidden // self.heads or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most {self.hidden // self.heads}")
        return self


class ModelConfig(Section):
    """The base model and its tokenizer."""

    base: str = setting("EleutherAI/gpt-j-6b", "`tiny`, a Hub name or a local directory of a causal LM", origin=TRLX)
    tokenizer: str | None = setting(
        None,
        "Hub name or local directory of a tokenizer; empty: the base model's (for `tiny`: trained on the posts)",
    )
    pickled: Literal["refuse", "convert"] = setting(
        "refuse", "a base that is published as a pickle only: refused, or its tensors alone taken out by `fetch`"
    )
    tiny: TinyModelConfig = Field(default_factory=TinyModelConfig)


class PromptConfig(Section):
    """How long a prompt and a summary may be."""

    max_prompt_tokens: int = setting(
        500, "longer posts are cut at the body's end to fit", unit="tokens", origin=TRLX, ge=16
    )
    max_response_tokens: int = setting(50, "tokens a summary may have, EOS included", unit="tokens", origin=TRLX, ge=2)

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and response together."""
        return self.max_prompt_tokens + self.max_response_tokens


class OptimizerConfig(Section):
    """AdamW, its schedule and the clipping of gradients."""

    learning_rate: float = setting(1e-5, "peak learning rate", origin=TRLX, gt=0)
    final_learning_rate: float = setting(0.0, "where a cosine or linear schedule ends", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "how the learning rate falls")
    warmup_steps: int = setting(100, "linear warm-up", unit="optimiser steps", origin=TRLX, ge=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's moment decay rates", origin=TRLX)
    eps: float = setting(1e-8, "AdamW's epsilon", origin=TRLX, gt=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", ge=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)


class LoraConfig(Section):
    """Low-rank adapters on a frozen model, in place of training its weights."""

    rank: int | None = setting(None, "rank of the adapters; empty: no adapters, the weights are trained", ge=1)
    alpha: float = setting(16.0, "an adapter's output is multiplied by alpha / rank", gt=0)
    targets: tuple[str, ...] = setting(
        ("q_proj", "v_proj"), "names of the linear layers that get an adapter, as the model's class names them"
    )
    quantize: Literal["none", "4bit"] = setting(
        "none", "how the frozen weights lie in memory; `4bit` (QLoRA) needs a GPU and bitsandbytes"
    )


class TrainerConfig(Section):
    """What SFT and the reward model's training have in common."""

    epochs: float = setting(1.0, "passes over the training data", unit="epochs", gt=0)
    max_steps: int | None = setting(None, "ends the training early", unit="optimiser steps", ge=1)
    batch_size: int = setting(16, "examples in an optimiser step, over all processes", ge=1)
    micro_batch_size: int = setting(16, "examples in one forward pass of one process", ge=1, may_change=True)
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass to save memory", may_change=True
    )
    deepspeed: str | None = setting(None, DEEPSPEED, may_change=True)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    eval_every_steps: int = setting(
        500, "how often the held-out data is looked at", unit="optimiser steps", ge=1, may_change=True
    )
    save_every_steps: int = setting(
        500, "how often a checkpoint is written", unit="optimiser steps", ge=1, may_change=True
    )


class SftConfig(TrainerConfig):
    """Supervised fine-tuning on posts and their summaries."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    loss_on: Literal["summary", "all"] = setting(
        "summary", "the tokens that count: summary and EOS, or the prompt's too (trlX)"
    )
    rouge_posts: int = setting(100, "held-out posts summarised for ROUGE at each evaluation", unit="posts", ge=1)


class RewardConfig(TrainerConfig):
    """The reward model's training on comparisons."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    frozen_fraction: float = setting(
        0.7,
        "share of the blocks, from the bottom, that stay as SFT left them, with the embeddings",
        origin=TRLX,
        ge=0,
        le=1,
    )
    loss: Literal["last", "divergent"] = setting(
        "last",
        "Bradley-Terry at the final token, or trlX's mean over the positions from the first difference on",
        origin=NPLUS,
    )


class PrepareConfig(Section):
    """PPO's environment."""

    batch_tokens: int = setting(16384, "tokens computed in one scoring batch", unit="tokens", ge=1)


class RemoteScorerConfig(Section):
    """The service whose `POST /score` scores PPO's rollouts, with `ppo.reward_placement: remote`."""

    url: str | None = setting(
        None,
        "where the service is, `http://rlhf-api:8000` say; it has to serve this run's reward model",
        may_change=True,
    )
    api_key_file: str | None = setting(None, "a file that holds the service's API key; empty: none", may_change=True)
    items_per_request: int = setting(64, "summaries in one request", unit="summaries", ge=1, may_change=True)
    timeout_seconds: float = setting(30.0, "deadline of one request", unit="seconds", gt=0, may_change=True)
    retry_seconds: float = setting(
        45.0,
        "tries go on for so long; then PPO waits, ready to be stopped, until the service is back",
        unit="seconds",
        gt=0,
        may_change=True,
    )


class PpoConfig(Section):
    """Proximal policy optimisation against the reward model, leashed to the SFT policy."""

    engine: Literal["builtin", "trlx"] = setting(
        "builtin", "who runs the stage: this project, or trlX itself where it is installed"
    )
    sampler: Literal["builtin", "vllm"] = setting(
        "builtin",
        "what samples the rollouts: the built-in engine, which runs the policy itself, or vLLM, where it is installed, "
        "with a copy of the policy's weights beside it",
        may_change=True,
    )
    deepspeed: str | None = setting(None, DEEPSPEED, may_change=True)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    reward_placement: Literal["colocated", "dedicated", "remote"] = setting(
        "colocated",
        "where rollouts are scored: by each process on its own device, on the GPU after the policy's (one process), or "
        "by a service",
        may_change=True,
    )
    remote: RemoteScorerConfig = Field(default_factory=RemoteScorerConfig)
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=5e-6,
            final_learning_rate=5e-6,
            warmup_steps=0,
            betas=(0.9, 0.999),
            weight_decay=0.01,
        )
    )
    iterations: int = setting(781, "rounds of rollouts and optimisation", origin=TRLX, ge=1)
    schedule_steps: int | None = setting(
        None, "length of the learning-rate schedule; empty: the whole run", unit="optimiser steps", ge=1
    )
    unfrozen_layers: int | Literal["all"] = setting(
        8, "blocks trained, from the top; the rest is a trunk shared with the reference", origin=TRLX
    )
    value_network: Literal["head", "separate"] = setting(
        "head", "a head on the policy (trlX), or a network of its own that starts as the reward model (N+)"
    )
    rollouts_per_iteration: int = setting(128, "summaries sampled before each optimisation", origin=TRLX, ge=2)
    rollout_chunk: int = setting(16, "summaries sampled in one batch", origin=TRLX, ge=1)
    inner_epochs: int = setting(4, "passes over the rollouts", origin=TRLX, ge=1)
    minibatch_size: int = setting(4, "rollouts in an optimiser step, over all processes", origin=TRLX, ge=1)
    micro_batch_size: int = setting(4, "rollouts in one forward pass of one process", ge=1, may_change=True)
    temperature: float = setting(1.0, "of sampling, and of every log-probability", gt=0)
    reward: Literal["delta", "absolute"] = setting(
        "delta", "score minus the reference summary's score, or the score itself", origin=TRLX
    )
    clip_score: float | None = setting(10.0, "scores are clipped to ± this", origin=TRLX, gt=0)
    scale_score: Literal["none", "running"] = setting("none", "divide scores by their running deviation")
    missing_eos_score: float | None = setting(
        None, "replaces the score of a summary that never ended (N+: -1); empty: the score stands"
    )
    missing_eos_penalty: float = setting(0.0, "taken from the score of a summary that never ended", ge=0)
    kl_controller: Literal["adaptive", "fixed"] = setting("adaptive", "how the KL coefficient moves", origin=TRLX)
    init_kl_coef: float = setting(0.1, "first, or fixed, KL coefficient", origin=TRLX, ge=0)
    kl_target: float = setting(6.0, "the adaptive controller's target", unit="nats a summary", origin=TRLX, gt=0)
    kl_horizon: int = setting(10_000, "the adaptive controller's horizon", unit="rollouts", origin=TRLX, ge=1)
    gamma: float = setting(1.0, "discount", origin=TRLX, gt=0, le=1)
    lam: float = setting(0.95, "GAE's lambda", origin=TRLX, ge=0, le=1)
    clip_ratio: float = setting(0.2, "the policy ratio's clip range", origin=TRLX, gt=0)
    clip_value: float = setting(0.2, "the value's clip range around its old value", origin=TRLX, gt=0)
    vf_coef: float = setting(0.2, "weight of the value loss", origin=TRLX, ge=0)
    stop_kl: float | None = setting(
        None,
        "ends the inner epochs when the policy moved this far from the rollouts",
        unit="nats a token",
        gt=0,
    )
    max_kl: float = setting(
        100.0, "an iteration whose rollouts are further than this from SFT is skipped", unit="nats a summary", gt=0
    )
    kl_budget: float = setting(
        20.0, "the best policy is sought among those within this KL to SFT", unit="nats a summary", gt=0
    )
    eval_every_iterations: int = setting(2, "how often held-out posts are summarised", unit="iterations", ge=1)
    eval_posts: int = setting(1000, "held-out posts of an evaluation", unit="posts", origin=TRLX, ge=1)
    save_every_iterations: int = setting(
        10, "how often a checkpoint is written", unit="iterations", ge=1, may_change=True
    )
    sample_table_posts: int = setting(
        8, "posts in the table of samples at each evaluation", unit="posts", ge=1, may_change=True
    )

    @model_validator(mode="after")
    def _batches_divide(self) -> PpoConfig:
        for name, whole, part_name, part in (
            ("rollouts_per_iteration", self.rollouts_per_iteration, "rollout_chunk", self.rollout_chunk),
            ("rollouts_per_iteration", self.rollouts_per_iteration, "minibatch_size", self.minibatch_size),
            ("minibatch_size", self.minibatch_size, "micro_batch_size", self.micro_batch_size),
        ):
            if whole % part:
                remedy = max(whole // part, 1) * part
                raise ValueError(f"{name}={whole} is not a multiple of {part_name}={part}; try {name}={remedy}")
        if isinstance(self.unfrozen_layers, int) and self.unfrozen_layers < 1:
            raise ValueError(f"unfrozen_layers={self.unfrozen_layers} trains nothing; give 1 or more, or `all`")
        return self

    @property
    def optimizer_steps_per_iteration(self) -> int:
        """Minibatches in all inner epochs of one iteration."""
        return self.inner_epochs * self.rollouts_per_iteration // self.minibatch_size

    @property
    def total_optimizer_steps(self) -> int:
        """Minibatches of the whole run."""
        return self.iterations * self.optimizer_steps_per_iteration


class EvaluateConfig(Section):
    """The comparison of SFT, PPO, reference and lead on the test posts."""

    max_posts: int | None = setting(None, "at most so many test posts", unit="posts", ge=1)
    temperature: float = setting(0.0, "0: greedy; else summaries are sampled", ge=0)
    batch_size: int = setting(64, "summaries generated at once", ge=1)
    batch_tokens: int = setting(16384, "tokens computed in one scoring batch", unit="tokens", ge=1)
    bootstrap_samples: int = setting(1000, "resamples behind each 95 % interval", ge=100)
    lead_sentences: int = setting(2, "sentences of the lead baseline", ge=1)


class RuntimeConfig(Section):
    """The machine: devices, precision, stopping, saving, logging."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where it is", may_change=True)
    precision: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "of computation and frozen weights; trained weights are float32"
    )
    threads: int | None = setting(
        None, "CPU threads; empty: one a core that the container may use", ge=1, may_change=True
    )
    stop_within_seconds: int = setting(
        120, "after SIGTERM the state is saved in this time", unit="seconds", ge=1, may_change=True
    )
    lease_seconds: float = setting(
        30.0,
        "a stage whose process shows no sign of life for so long may be taken over",
        unit="seconds",
        gt=0,
        lt=86400,
        may_change=True,
    )
    hang_after_seconds: float = setting(
        1800.0,
        "a process that finishes no step for so long shows its stacks and ends",
        unit="seconds",
        gt=0,
        may_change=True,
    )
    max_bad_steps: int = setting(
        3,
        "so many steps in a row with numbers that are not finite, all skipped, end the stage",
        unit="steps",
        ge=1,
        may_change=True,
    )
    keep_checkpoints: int = setting(2, "newest checkpoints kept beside best and final", ge=1, may_change=True)
    log_every_steps: int = setting(10, "how often metrics are written", unit="optimiser steps", ge=1, may_change=True)
    tensorboard: bool = setting(True, "write TensorBoard events beside metrics.jsonl", may_change=True)


class Config(Section):
    """A run."""

    seed: int = setting(1, "of data order, sampling and initial weights", ge=0, le=2**32 - 1)
    data: DataConfig = Field(default_factory=DataConfig)
    synthetic: SyntheticConfig = Field(default_factory=SyntheticConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    ppo: PpoConfig = Field(default_factory=PpoConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its declaration, in schema order."""
    for name, info in section.model_fields.items():
        if nested := section_type(info.annotation):
            yield from fields(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def changeable_keys() -> frozenset[str]:
    """The keys that a stage which has begun may go on with under another value."""
    extras = ((key, info.json_schema_extra) for key, info in fields())
    return frozenset(key for key, extra in extras if isinstance(extra, dict) and extra["may_change"])


def section_type(annotation: Any) -> type[Section] | None:
    """The schema of a nested group of keys; None for a plain key."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
