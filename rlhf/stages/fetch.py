"""Bring posts, comparisons and the base model onto the volume: the only stage that needs the network.

fetch/final/data/posts-{train,valid,test}.jsonl, comparisons-{train,valid}.jsonl, summary.json
fetch/final/base/   the base model and its tokenizer
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base_model import TINY, create_base, load_base
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.curate import cap, curate_comparisons, curate_posts, post_ids
from rlhf.data import Comparison, Example, write_jsonl
from rlhf.errors import ConfigError
from rlhf.hub import model_directory
from rlhf.intake import Intake, Placed, comparison_from, example_from, parse_rows
from rlhf.lengths import describe, token_counts, word_counts
from rlhf.pickled import convert_pickled, is_pickled
from rlhf.prompt import PROMPT_VERSION, Post, encode_prompt, render_prompt
from rlhf.sources import read_rows, source_names
from rlhf.stopping import StopSignal
from rlhf.storage import sha256, storage_errors, unfinished_name
from rlhf.synthetic import SyntheticData, generate
from rlhf.tokenizer import load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
LONGEST_CHARACTER_BYTES = 4
TOKENIZER_POSTS = 20_000
"""A tokenizer is learnt from at most so many training posts: more change little and cost minutes."""

_Record = TypeVar("_Record", Example, Comparison)
Splits = dict[str, list[Placed[_Record]]]


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Publish validated data and the base model as `fetch/final`.

    Raises DataError for bad or missing data, PrerequisiteError for a bad or missing base model or tokenizer,
    RlhfError when the Hub cannot be reached.
    """
    posts_intake = Intake.of("data.posts", config.data.posts)
    pairs_intake = Intake.of("data.comparisons", config.data.comparisons)

    # 1. Find what can be missing before an hour of work is spent.
    base_dir = None if config.model.base == TINY else _bring_base(config, stage)

    # 2. Rows to records, records to splits.
    world = _world(config)
    posts = _bring_posts(config, posts_intake, world)
    pairs = _bring_comparisons(config, pairs_intake, world, test_posts=post_ids(posts["test"]))
    posts, pairs = _capped_posts(posts, config, posts_intake), _capped_comparisons(pairs, config, pairs_intake)
    posts_intake.check_filled(posts)
    pairs_intake.check_filled(pairs)
    stop.check()

    # 3. The tokenizer, and the posts whose header it cannot fit.
    tokenizer = _bring_tokenizer(config, base_dir, posts["train"])
    posts = _drop_unfit(posts, tokenizer, config, posts_intake)
    pairs = _drop_unfit(pairs, tokenizer, config, pairs_intake)
    posts_intake.check_filled(posts)
    pairs_intake.check_filled(pairs)
    stop.check()

    # 4. Everything onto the volume at once.
    with stage.publish(0, final=True) as directory:
        model = create_base(config, tokenizer) if base_dir is None else load_base(config, base_dir, tokenizer)
        model.save_pretrained(directory / "base")
        tokenizer.save_pretrained(directory / "base")
        data_dir = directory / "data"
        data_dir.mkdir()
        summary = {
            "posts": _write(data_dir, "posts", posts, posts_intake, tokenizer, config),
            "comparisons": _write(data_dir, "comparisons", pairs, pairs_intake, tokenizer, config),
            "base": _describe_base(config, model, tokenizer),
        }
        (data_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _bring_base(config: Config, stage: StageDir) -> Path:
    """The base model's directory, its weights in safetensors."""
    convert = config.model.pickled == "convert"
    directory = model_directory("model.base", config.model.base, with_weights=True, pickled=convert)
    if not (convert and is_pickled(directory)):
        return directory
    with storage_errors(stage.path):
        stage.room.mkdir(parents=True, exist_ok=True)  # what lies there is cleared when the stage ends
        return convert_pickled(directory, stage.room / unfinished_name("base"))


def _world(config: Config) -> SyntheticData | None:
    """The demo's posts and comparisons, made once for both keys; None when neither key asks for them."""
    for key, setting in (("posts", config.data.posts), ("comparisons", config.data.comparisons)):
        if setting != SYNTHETIC and SYNTHETIC in source_names(setting):
            raise ConfigError(f"data.{key}={setting}: `{SYNTHETIC}` cannot be mixed with other sources; give it alone")
    if SYNTHETIC in (config.data.posts, config.data.comparisons):
        return generate(config.synthetic, seed=config.seed)
    return None


def _bring_posts(config: Config, intake: Intake, world: SyntheticData | None) -> Splits[Example]:
    if world is not None and config.data.posts == SYNTHETIC:
        placed = _placed(world.posts, intake)
    else:
        placed = parse_rows(read_rows(config.data.posts, key=intake.key), example_from, intake)
    intake.check_bad(config.data.max_bad_fraction)
    return curate_posts(placed, intake, config.data)


def _bring_comparisons(
    config: Config, intake: Intake, world: SyntheticData | None, *, test_posts: set[str]
) -> Splits[Comparison]:
    if world is not None and config.data.comparisons == SYNTHETIC:
        placed = _placed(world.comparisons, intake)
        min_words = 0  # the demo's writers may be brief
    else:
        placed = parse_rows(read_rows(config.data.comparisons, key=intake.key), comparison_from, intake)
        min_words = config.data.min_comparison_words
    intake.check_bad(config.data.max_bad_fraction)
    return curate_comparisons(placed, intake, config.data, test_posts=test_posts, min_words=min_words)


def _placed(splits: dict[str, list[_Record]], intake: Intake) -> list[Placed[_Record]]:
    """Generated records in the form of those that were read."""
    placed = [
        Placed(record=record, place=f"{SYNTHETIC}[{split}]: row {number}", split=split)
        for split, records in splits.items()
        for number, record in enumerate(records, start=1)
    ]
    intake.rows += len(placed)
    return placed


def _capped_posts(splits: Splits[Example], config: Config, intake: Intake) -> Splits[Example]:
    data = config.data
    limits = {"train": data.max_train_posts, "valid": data.max_valid_posts, "test": data.max_test_posts}
    return {
        split: cap(items, limits[split], seed=config.seed, intake=intake, split=split)
        for split, items in splits.items()
    }


def _capped_comparisons(splits: Splits[Comparison], config: Config, intake: Intake) -> Splits[Comparison]:
    limits = {"train": config.data.max_train_comparisons, "valid": config.data.max_valid_comparisons}
    return {
        split: cap(items, limits[split], seed=config.seed, intake=intake, split=split)
        for split, items in splits.items()
    }


def _bring_tokenizer(config: Config, base_dir: Path | None, train: list[Placed[Example]]) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, else the base model's, else one learnt from the training posts."""
    if config.model.tokenizer is not None:
        directory = model_directory("model.tokenizer", config.model.tokenizer, with_weights=False)
        return load_tokenizer(directory, key="model.tokenizer")
    if base_dir is not None:
        return load_tokenizer(base_dir, key="model.base")
    texts = (f"{render_prompt(item.record.post)} {item.record.summary}" for item in train[:TOKENIZER_POSTS])
    tokenizer = train_tokenizer(texts, vocab_size=config.model.tiny.vocab_size)
    logger.info("trained tokenizer tokens=%d posts=%d", len(tokenizer), min(len(train), TOKENIZER_POSTS))
    return tokenizer


def _drop_unfit(
    splits: Splits[_Record], tokenizer: PreTrainedTokenizerBase, config: Config, intake: Intake
) -> Splits[_Record]:
    """Report records whose header alone is longer than a prompt may be."""
    kept: Splits[_Record] = {split: [] for split in splits}
    for split, items in splits.items():
        for item in items:
            if reason := _why_unfit(item.record.post, tokenizer, config.prompt.max_prompt_tokens):
                intake.report_bad(item.place, reason)
            else:
                kept[split].append(item)
    intake.check_bad(config.data.max_bad_fraction)
    return kept


def _why_unfit(post: Post, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    header_bytes = len(render_prompt(post).encode()) - len(post.body.encode())
    if header_bytes + LONGEST_CHARACTER_BYTES <= max_tokens:
        return ""  # a token holds a byte at least, so there is no need to tokenise
    try:
        encode_prompt(tokenizer, post, max_tokens=max_tokens)
    except ValueError as error:
        return f"a prompt that cannot fit: {error} (prompt.max_prompt_tokens)"
    return ""


def _write(
    data_dir: Path,
    kind: str,
    splits: Splits[_Record],
    intake: Intake,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> dict[str, Any]:
    """Write the splits of one kind; gives and logs what is known of them."""
    logger.info("read key=%s rows=%d bad=%d reasons=%s", intake.key, intake.rows, intake.bad, dict(intake.bad_reasons))
    summary: dict[str, Any] = {
        "sources": intake.names,
        "rows": intake.rows,
        "bad": intake.bad,
        "bad_reasons": dict(intake.bad_reasons),
        "splits": {},
    }
    for split, items in splits.items():
        path = data_dir / f"{kind}-{split}.jsonl"
        write_jsonl(path, (item.record.to_row() for item in items))
        facts = {
            "kept": len(items),
            "dropped": dict(intake.dropped.get(split, {})),
            "sha256": sha256(path),
            **_length_facts([item.record for item in items], tokenizer, config),
        }
        summary["splits"][split] = facts
        logger.info(
            "wrote kind=%s split=%s kept=%d dropped=%s prompts_cut=%d responses_cut=%d",
            *(kind, split, len(items), facts["dropped"], facts["prompts_cut"], facts["responses_cut"]),
        )
    return summary


def _length_facts(
    records: Sequence[Example | Comparison], tokenizer: PreTrainedTokenizerBase, config: Config
) -> dict[str, Any]:
    """Lengths by kind of text, and how many prompts and responses are longer than a sequence may hold."""
    prompts = [render_prompt(record.post) for record in records]
    prompt_tokens = token_counts(tokenizer, prompts)
    lengths = {"prompt": {"words": describe(word_counts(prompts)), "tokens": describe(prompt_tokens)}}
    responses_cut = 0
    for name in ("summary", "chosen", "rejected"):
        texts = [" " + getattr(record, name) for record in records if hasattr(record, name)]
        if not texts:
            continue
        tokens = [count + 1 for count in token_counts(tokenizer, texts)]  # and EOS
        lengths[name] = {"words": describe(word_counts(texts)), "tokens": describe(tokens)}
        responses_cut += sum(count > config.prompt.max_response_tokens for count in tokens)
    return {
        "lengths": lengths,
        "prompts_cut": sum(count > config.prompt.max_prompt_tokens for count in prompt_tokens),
        "responses_cut": responses_cut,
    }


def _describe_base(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    facts = {
        "name": config.model.base,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "vocabulary_rows": model.get_input_embeddings().weight.shape[0],
        "tokens": len(tokenizer),
        "prompt_version": PROMPT_VERSION,
    }
    logger.info("base %s", " ".join(f"{name}={value}" for name, value in facts.items()))
    return facts
