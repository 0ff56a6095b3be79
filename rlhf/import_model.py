"""A published checkpoint becomes a stage of a run, as if that stage had trained it: `sft`, `ppo` or `reward`.

What is written is what every stage writes: a directory that transformers loads, weights in safetensors, tokenizer
inside, manifest, config.yaml; and imported.json, which says where it comes from. All that can be wrong with the
checkpoint is looked for before the first byte is written.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTJConfig, PreTrainedTokenizerBase

from rlhf.checkpoint import CONFIG_FILE, StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError, ConflictError, PrerequisiteError, StorageError
from rlhf.hub import is_file, model_directory
from rlhf.lease import take_lease
from rlhf.model_files import open_config
from rlhf.pipeline import check_settings
from rlhf.prompt import PROMPT_VERSION, TRLX_START, TRLX_VERSION, encode_text
from rlhf.published_checkpoint import (
    AUTO_CLASSES,
    Kind,
    check_weights,
    checkpoint_config,
    named_weights,
    read_checkpoint,
)
from rlhf.runtime import torch_dtype
from rlhf.tokenizer import load_tokenizer
from rlhf.weights import INDEX, WEIGHTS

logger = logging.getLogger(__name__)

STEP = 0
"""Of the published directory: no step of ours has made it."""
SHARD_BYTES = 2 * 10**9
IMPORTED, METRICS = "imported.json", "metrics.json"
TOKENIZERS = ("fetch/final/base", "sft/final", "ppo/final", "reward/final")
"""Where a run has one, the base model's first."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be imported: a directory, a weights file, or a name on the Hub, and what it lacks.

    config_from is a directory with a config.json; tokenizer a directory or a name on the Hub; dtype as torch names it,
    None to keep what the file has.
    """

    kind: Kind
    path: str
    config_from: Path | None = None
    tokenizer: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Checked:
    """A checkpoint that was found to be whole."""

    source: Source
    config: GPTJConfig
    weights: dict[str, Tensor]
    dtype: torch.dtype | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def bytes(self) -> int:
        """Size of the weights as they will be written."""
        return sum(w.numel() * (self.dtype or w.dtype).itemsize for w in self.weights.values())


def import_model(source: Source, stage: str, config: Config, run_dir: Path) -> Path:
    """Publish a checkpoint as `<run>/<stage>/final`; returns the directory.

    Raises PrerequisiteError for a checkpoint that cannot be used, ConflictError when the run has that stage,
    ConfigError when the settings do not fit the run or the model, StorageError for want of room.
    """
    _refuse_existing(StageDir(run_dir, stage))
    check_settings(config, run_dir)
    checked = check_source(source, run_dir)
    _check_lengths(checked.config, config)
    _check_room(checked, run_dir)
    with take_lease(run_dir / stage, seconds=config.runtime.lease_seconds) as lease:
        directory = StageDir(run_dir, stage, lease=lease, settings=config.to_yaml())
        directory.remove_unfinished()
        _refuse_existing(directory)
        directory.write_text(CONFIG_FILE, config.to_yaml())
        with directory.publish(STEP, final=True) as work:
            write_model(checked, work)
    return run_dir / stage / "final"


def check_source(source: Source, run_dir: Path) -> Checked:
    """Read a checkpoint and look for everything that can be wrong with it. Raises PrerequisiteError."""
    path = Path(source.path)
    if not is_file(source.path):
        path = model_directory("PATH", source.path, with_weights=True, pickled=True)
    weights = named_weights(source.kind, read_checkpoint(path), path)
    config = checkpoint_config(source.kind, weights, path, source.config_from)
    check_weights(source.kind, config, weights, path)
    dtype = torch_dtype(source.dtype) if source.dtype else None
    _check_numbers(weights, dtype, path)
    tokenizer = find_tokenizer(source, path, run_dir, rows=config.vocab_size)
    logger.info("read path=%s kind=%s tensors=%d blocks=%d", path, source.kind, len(weights), config.n_layer)
    stamp(config, source.kind, tokenizer)
    return Checked(source, config, weights, dtype, tokenizer)


def stamp(config: GPTJConfig, kind: Kind, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the config what the pipeline reads there: tokens, and the prompt format that the model knows."""
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.architectures = [AUTO_CLASSES[kind]._model_mapping[GPTJConfig].__name__]
    config.prompt_version = PROMPT_VERSION
    if kind == "reward":
        config.score_shift = 0.0
        config.prompt_version = TRLX_VERSION
        config.score_prefix_ids = encode_text(tokenizer, TRLX_START)


def find_tokenizer(source: Source, path: Path, run_dir: Path, *, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, else the checkpoint's, else the run's; with no more tokens than the model's rows.

    Raises PrerequisiteError where there is none, or where another model of the run has another one: neither
    `evaluate` nor the service could use them together.
    """
    of_run = [run_dir / place for place in TOKENIZERS if _holds_tokenizer(run_dir / place)]
    if source.tokenizer is not None:
        key, directory = "--tokenizer", model_directory("--tokenizer", source.tokenizer, with_weights=False)
    elif path.is_dir() and _holds_tokenizer(path):
        key, directory = "PATH", path
    elif of_run:
        key, directory = "--run", of_run[0]
    else:
        raise PrerequisiteError(
            f"{path} holds no tokenizer, and neither does {run_dir}; give GPT-J's by --tokenizer DIR|NAME"
        )
    tokenizer = load_tokenizer(directory, key=key)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise PrerequisiteError(
            f"{directory}: token {token!r} has id {number}, and the model has {rows} rows; give the tokenizer that it "
            "was trained with by --tokenizer DIR|NAME"
        )
    for place in of_run:
        other = load_tokenizer(place, key="--run")
        if (other.get_vocab(), other.eos_token_id) != (tokenizer.get_vocab(), tokenizer.eos_token_id):
            raise PrerequisiteError(
                f"the tokenizers of {directory} and {place} differ, so the run's models could not be used together; "
                f"give --tokenizer {place}, or another --run"
            )
    return tokenizer


def write_model(checked: Checked, directory: Path) -> None:
    """Weights, config, tokenizer, and where they come from; then look whether it can be opened."""
    write_weights(checked.weights, directory, dtype=checked.dtype)
    checked.config.dtype = checked.dtype or checked.weights["transformer.wte.weight"].dtype
    checked.config.save_pretrained(directory)
    checked.tokenizer.save_pretrained(directory)
    facts = {"imported": asdict(checked.source) | {"config_from": str(checked.source.config_from or "")}}
    facts["imported"] |= {"prompt_version": checked.config.prompt_version, "tensors": len(checked.weights)}
    _write_json(directory / IMPORTED, facts)
    if checked.source.kind == "reward":
        note = "trained elsewhere: its accuracy was not measured in this run, and its references do not average 0"
        _write_json(directory / METRICS, facts | {"note": note})
    open_config(directory)


def write_weights(
    weights: Mapping[str, Tensor], directory: Path, *, dtype: torch.dtype | None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Save as safetensors, in shards that are converted one at a time: memory for one of them is enough."""
    shards = list(_shards(weights, dtype, shard_bytes))
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        # Cloned, so that no two share memory, which the format does not know.
        tensors = {name: weights[name].to(dtype or weights[name].dtype).clone().contiguous() for name in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(w.numel() * (dtype or w.dtype).itemsize for w in weights.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _shards(weights: Mapping[str, Tensor], dtype: torch.dtype | None, most: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in sorted(weights):
        needed = weights[name].numel() * (dtype or weights[name].dtype).itemsize
        if shard and size + needed > most:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += needed
    yield shard


def _refuse_existing(directory: StageDir) -> None:
    if directory.steps() or directory.named("final"):
        raise ConflictError(
            f"{directory.path} holds a model already; import into another --run, or move that folder and those of "
            "the stages after it aside"
        )


def _check_numbers(weights: Mapping[str, Tensor], dtype: torch.dtype | None, path: Path) -> None:
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise PrerequisiteError(f"{path}: {name} holds numbers that are not finite; download the model again")
        if dtype is not None and not bool(weight.to(dtype).isfinite().all()):
            raise PrerequisiteError(f"{path}: {name} does not fit into {dtype}; give --dtype bfloat16 or float32")


def _check_lengths(model: GPTJConfig, config: Config) -> None:
    tokens = config.prompt.max_sequence_tokens + len(getattr(model, "score_prefix_ids", ()))
    if tokens > model.n_positions:
        raise ConfigError(
            f"prompt.max_prompt_tokens={config.prompt.max_prompt_tokens} and prompt.max_response_tokens="
            f"{config.prompt.max_response_tokens} need {tokens} positions, and the model has {model.n_positions}; set "
            f"prompt.max_prompt_tokens={config.prompt.max_prompt_tokens - tokens + model.n_positions} or less"
        )


def _check_room(checked: Checked, run_dir: Path) -> None:
    place = run_dir
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < checked.bytes:
        raise StorageError(
            f"{run_dir} has room for {free / 1e9:.1f} GB, and the weights take {checked.bytes / 1e9:.1f} GB; free "
            "some, or give --dtype float16 or another --runs-dir"
        )


def _holds_tokenizer(directory: Path) -> bool:
    """Whether it holds a fast tokenizer's file, or GPT-2's two."""
    return (directory / "tokenizer.json").is_file() or all(
        (directory / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
