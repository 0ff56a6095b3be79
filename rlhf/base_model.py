"""The base model as `fetch` publishes it: a causal LM that fits its tokenizer, its prompts and this format."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.errors import ConfigError, PrerequisiteError
from rlhf.model_files import load_model, open_config
from rlhf.models import create_tiny_gptj, stamp_prompt_version

logger = logging.getLogger(__name__)

TINY = "tiny"
_ROW_MULTIPLE = 8
"""Vocabulary rows are rounded up to this, so that matrix products stay on the fast path."""


def create_base(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The tiny GPT-J with random weights, as large as the prompts and the tokenizer need."""
    shape = config.model.tiny
    tokens = len(tokenizer)
    model = create_tiny_gptj(
        shape,
        positions=config.prompt.max_sequence_tokens,
        vocab_size=tokens if tokens == shape.vocab_size else -(-tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
    )
    stamp_prompt_version(model)
    return model


def load_base(config: Config, directory: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal LM in a directory, in the precision it was saved in, with a row for every token.

    Raises PrerequisiteError when it is no causal LM or lacks weights, ConfigError when prompts are too long for it.
    """
    model = _load(directory)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < config.prompt.max_sequence_tokens:
        raise ConfigError(
            f"prompt.max_prompt_tokens={config.prompt.max_prompt_tokens} and prompt.max_response_tokens="
            f"{config.prompt.max_response_tokens} exceed the {positions} positions of model.base={config.model.base}; "
            f"set prompt.max_prompt_tokens={positions - config.prompt.max_response_tokens} or less"
        )
    _add_rows(model, len(tokenizer))
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    stamp_prompt_version(model)
    return model


def _load(directory: Path) -> PreTrainedModel:
    where = f"model.base={directory}"
    try:
        config, stored = open_config(directory)
        model, missing, _ = load_model(AutoModelForCausalLM, directory, config, stored, "auto")
    except PrerequisiteError as error:
        raise PrerequisiteError(f"{where} cannot be loaded as a causal LM: {error}; or give another base") from error
    if missing:
        raise PrerequisiteError(
            f"{where} is not a whole causal LM: {len(missing)} weights are missing, first {min(missing)}; "
            "give one that has a language-model head"
        )
    return model


def _add_rows(model: PreTrainedModel, tokens: int) -> None:
    """Give new tokens the average row, so that none gets much probability; spare rows are used first.

    A random row's logit would be near 0, where trained logits can all be far below it.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    if tokens <= old_rows:
        return
    model.resize_token_embeddings(tokens, pad_to_multiple_of=_ROW_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in layer.parameters():
                parameter[old_rows:] = parameter[:old_rows].mean(dim=0)
    logger.info("added vocabulary rows old=%d tokens=%d", old_rows, tokens)
