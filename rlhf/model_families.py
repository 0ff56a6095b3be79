"""Shapes of models, read from their config.json without torch.

What is known here is known exactly; a family that is not listed is refused rather than guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.model_shape import Linear, ModelShape

GPT_J_6B = {
    "model_type": "gptj",
    "n_layer": 28,
    "n_embd": 4096,
    "n_head": 16,
    "rotary_dim": 64,
    "n_positions": 2048,
    "vocab_size": 50400,
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
}
"""config.json of EleutherAI/gpt-j-6b, as far as a shape needs it: 6,050,882,784 parameters."""

TANH_GELU = {"gelu_new": "gelu_pytorch_tanh"}
"""Of GPT-J: torch's fused GELU stands in for transformers' steps (rlhf.gptj)."""

PUBLISHED = {"eleutherai/gpt-j-6b": GPT_J_6B}


def find_shape(config: Config, fetched: Path | None, model: str | None) -> ModelShape:
    """The shape of the model that a run begins with.

    Looked for in this order: `model` (a directory, a config.json or a published name), the base that `fetch` has
    brought for this configuration, `tiny`, and `model.base` as a directory or a published name.
    Raises ConfigError when none of them says it.
    """
    if model is not None:
        return _named(model, key="--model")
    if fetched is not None and (fetched / "config.json").is_file():
        return read_shape(fetched)
    if config.model.base == "tiny":
        return tiny_shape(config)
    return _named(config.model.base, key="model.base")


def _named(name: str, *, key: str) -> ModelShape:
    path = Path(name)
    if path.is_file() or (path / "config.json").is_file():
        return read_shape(path)
    if (published := PUBLISHED.get(name.lower())) is not None:
        return shape_of(published, name=name)
    raise ConfigError(
        f"{key}={name}: its shape is not known here; run `rlhf fetch` first, or give --model a directory with its "
        f"config.json (known without one: {', '.join(('tiny', *PUBLISHED))})"
    )


def tiny_shape(config: Config) -> ModelShape:
    """The GPT-J that `model.base: tiny` makes."""
    tiny = config.model.tiny
    settings = {
        "model_type": "gptj",
        "n_layer": tiny.layers,
        "n_embd": tiny.hidden,
        "n_head": tiny.heads,
        "rotary_dim": tiny.rotary_dim,
        "n_positions": config.prompt.max_sequence_tokens,
        "vocab_size": tiny.vocab_size,
        "tie_word_embeddings": False,
    }
    return shape_of(settings, name="tiny")


def read_shape(path: Path) -> ModelShape:
    """The shape that a model directory or its config.json says. Raises ConfigError for what cannot be read."""
    file = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as a model's config.json: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds no JSON object; give a model's config.json")
    return shape_of(settings, name=str(path))


def shape_of(settings: Mapping[str, Any], *, name: str) -> ModelShape:
    """The shape that the keys of a config.json describe.

    Raises ConfigError for a family that is not known here and for a key that is missing or no number.
    """
    family = settings.get("model_type")
    build = FAMILIES.get(str(family))
    if build is None:
        raise ConfigError(
            f"{name}: the memory of model_type={family!r} is not known; known are {', '.join(sorted(FAMILIES))}. "
            "Give --model one of those of like size, or train a step and read the peak"
        )
    try:
        return build(_Settings(settings), name)
    except KeyError as error:
        raise ConfigError(f"{name}: config.json has no number {error}; complete it") from error


class _Settings:
    """A config.json under the two names that transformers gives to a setting."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of the names that holds a positive number. Raises KeyError where none does."""
        for name in names:
            value = self._settings.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise KeyError(names[0])
        return default

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self._settings.get(name, default))

    def word(self, *names: str, default: str) -> str:
        """The first of the names that holds a word."""
        return next((str(self._settings[name]) for name in names if self._settings.get(name)), default)


def _gptj(settings: _Settings, name: str) -> ModelShape:
    hidden, layers = settings.number("n_embd", "hidden_size"), settings.number("n_layer", "num_hidden_layers")
    ffn, vocab = settings.number("n_inner", default=4 * hidden), settings.number("vocab_size")
    positions = settings.number("n_positions", default=2048)
    activation = settings.word("activation_function", default="gelu_new")
    linears = (
        *(Linear(f"{part}_proj", hidden, hidden, False, "norm") for part in "qkv"),
        Linear("out_proj", hidden, hidden, False, "context"),
        Linear("fc_in", hidden, ffn, True, "norm"),
        Linear("fc_out", ffn, hidden, True, "ffn"),
    )
    return ModelShape(
        name, "gptj", layers, hidden, settings.number("n_head", "num_attention_heads"), hidden, ffn, vocab, positions,
        settings.flag("tie_word_embeddings", False), linears, norm_numbers=2 * hidden, final_norm=2 * hidden,
        position_numbers=0, head_bias=True, activation=TANH_GELU.get(activation, activation),
        residuals=1, attention_kept=3 * hidden, packed=True,
        buffer_numbers=layers * positions * settings.number("rotary_dim", default=hidden),
    )  # fmt: skip


def _gpt2(settings: _Settings, name: str) -> ModelShape:
    hidden, layers = settings.number("n_embd", "hidden_size"), settings.number("n_layer", "num_hidden_layers")
    ffn, positions = settings.number("n_inner", default=4 * hidden), settings.number("n_positions", default=1024)
    linears = (
        Linear("c_attn", hidden, 3 * hidden, True, "norm"),
        Linear("c_proj", hidden, hidden, True, "context"),
        Linear("c_fc", hidden, ffn, True, "norm2"),
        Linear("c_proj", ffn, hidden, True, "ffn"),
    )
    return ModelShape(
        name, "gpt2", layers, hidden, settings.number("n_head", "num_attention_heads"), hidden, ffn,
        settings.number("vocab_size"), positions, settings.flag("tie_word_embeddings", True), linears,
        norm_numbers=4 * hidden, final_norm=2 * hidden, position_numbers=positions * hidden, head_bias=False,
        activation=settings.word("activation_function", default="gelu_new"),
        residuals=2, attention_kept=3 * hidden, packed=False,
    )  # fmt: skip


def _gpt_neox(settings: _Settings, name: str) -> ModelShape:
    hidden, ffn = settings.number("hidden_size"), settings.number("intermediate_size")
    bias = settings.flag("attention_bias", True)
    linears = (
        Linear("query_key_value", hidden, 3 * hidden, bias, "norm"),
        Linear("dense", hidden, hidden, bias, "context"),
        Linear("dense_h_to_4h", hidden, ffn, True, "norm2"),
        Linear("dense_4h_to_h", ffn, hidden, True, "ffn"),
    )
    return ModelShape(
        name, "gpt_neox", settings.number("num_hidden_layers"), hidden, settings.number("num_attention_heads"), hidden,
        ffn, settings.number("vocab_size"), settings.number("max_position_embeddings", default=2048),
        settings.flag("tie_word_embeddings", False), linears, norm_numbers=4 * hidden, final_norm=2 * hidden,
        position_numbers=0, head_bias=False, activation=settings.word("hidden_act", default="gelu"),
        residuals=1 if settings.flag("use_parallel_residual", True) else 2, attention_kept=6 * hidden, packed=False,
    )  # fmt: skip


def _llama(family: Literal["llama", "mistral", "qwen2"]) -> Callable[[_Settings, str], ModelShape]:
    def build(settings: _Settings, name: str) -> ModelShape:
        hidden, ffn = settings.number("hidden_size"), settings.number("intermediate_size")
        heads = settings.number("num_attention_heads")
        size = settings.number("head_dim", default=hidden // heads)
        inner, kv_size = heads * size, settings.number("num_key_value_heads", default=heads) * size
        bias = family == "qwen2" or (family == "llama" and settings.flag("attention_bias", False))
        out_bias, mlp_bias = bias and family == "llama", family == "llama" and settings.flag("mlp_bias", False)
        linears = (
            Linear("q_proj", hidden, inner, bias, "norm"),
            Linear("k_proj", hidden, kv_size, bias, "norm"),
            Linear("v_proj", hidden, kv_size, bias, "norm"),
            Linear("o_proj", inner, hidden, out_bias, "context"),
            Linear("gate_proj", hidden, ffn, mlp_bias, "norm2"),
            Linear("up_proj", hidden, ffn, mlp_bias, "norm2"),
            Linear("down_proj", ffn, hidden, mlp_bias, "ffn"),
        )
        return ModelShape(
            name, family, settings.number("num_hidden_layers"), hidden, heads, kv_size, ffn,
            settings.number("vocab_size"), settings.number("max_position_embeddings", default=2048),
            settings.flag("tie_word_embeddings", False), linears, norm_numbers=2 * hidden, final_norm=hidden,
            position_numbers=0, head_bias=False, activation=settings.word("hidden_act", default="silu"),
            residuals=4, attention_kept=3 * inner, packed=False,
        )  # fmt: skip

    return build


FAMILIES: dict[str, Callable[[_Settings, str], ModelShape]] = {
    "gptj": _gptj,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama("llama"),
    "mistral": _llama("mistral"),
    "qwen2": _llama("qwen2"),
}
"""How a shape is read, by config.json's model_type."""
