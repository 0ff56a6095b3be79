"""Tokenizers: trained in GPT-2's manner, loaded from a directory, always with a pad token that is not EOS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from rlhf.errors import PrerequisiteError

EOS = "<|endoftext|>"
PAD = "<|pad|>"
SPARE = re.compile(r"<\|extratoken_\d+\|>")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE with GPT-2's pre-tokenisation; the same texts give the same tokenizer.

    vocab_size counts EOS (id 0), the pad token (id 1) and the 256 bytes; a small corpus can yield fewer entries.
    Source: Radford et al. 2019, section 2.2.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, eos_token=EOS, pad_token=PAD)


def load_tokenizer(directory: Path, *, key: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a directory, which may hold no more than GPT-2's vocab.json and merges.txt.

    A pad token is added when there is none, or when it is EOS. Nothing is downloaded.
    Raises PrerequisiteError naming the key when there is no usable tokenizer.
    """
    bare = not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    if bare and not all((directory / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise PrerequisiteError(
            f"{key}={directory} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt; "
            "name a directory that does in model.tokenizer"
        )
    loader = GPT2Tokenizer if bare else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise PrerequisiteError(
            f"{key}={directory}: its tokenizer cannot be loaded: {reason}; name another in model.tokenizer"
        ) from error
    return _fit_for_use(tokenizer, f"{key}={directory}")


def _fit_for_use(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    if not tokenizer.is_fast:
        raise PrerequisiteError(f"{where}: {type(tokenizer).__name__} has no fast version, which cutting posts needs")
    if tokenizer.eos_token_id is None:
        raise PrerequisiteError(f"{where}: the tokenizer has no EOS token, which ends a summary; name another")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": _spare_token(tokenizer) or PAD})
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """One of the unused entries that GPT-J's tokenizer has for every row of its embeddings, if there are any."""
    spare = [token for token in tokenizer.get_added_vocab() if SPARE.fullmatch(token)]
    return max(spare, key=tokenizer.convert_tokens_to_ids, default=None)
