"""What a run has published, judged before anything is loaded.

`final` is resolved once; everything after that goes by the resolved directory, since the link may move meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from transformers import PretrainedConfig

from app.settings import Settings
from rlhf.checkpoint import MANIFEST, DamagedCheckpoint, fingerprint, read_manifest, verify
from rlhf.config import PromptConfig
from rlhf.errors import PrerequisiteError
from rlhf.model_files import open_config
from rlhf.pipeline import CONFIG_FILE
from rlhf.prompt import PROMPT_VERSION, REWARD_VERSIONS
from rlhf.scoring import framing_of
from rlhf.storage import sha256, storage_errors
from rlhf.weights import count_parameters, weight_files

SAFETENSORS = ".safetensors"

ModelName = Literal["ppo", "sft", "reward"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model directory as its small files describe it.

    checksum is `rlhf.checkpoint.fingerprint`, files the manifest's list of them; positions are those of a prompt
    and its summary, None where the model sets no limit; own_tokens come on top, which a reward model's prompt version
    puts before them.
    """

    name: ModelName
    run: str
    directory: Path
    step: int
    checksum: str
    files: Mapping[str, Any]
    config: PretrainedConfig
    parameters: int
    prompt_version: str
    own_tokens: int
    positions: int | None
    max_prompt_tokens: int
    max_new_tokens: int


def model_names(settings: Settings) -> tuple[ModelName, ...]:
    """The policies to be served, and the reward model last."""
    return (*settings.models, "reward")


def published(settings: Settings) -> dict[str, Path]:
    """The directory that `final` names now, of each model to be served; only links are read.

    Raises PrerequisiteError naming the command that makes one that is not there.
    """
    return {name: _final(settings.run_dir, name) for name in model_names(settings)}


def describe(name: ModelName, directory: Path, run: str) -> Published:
    """Read a model directory's small files and the headers of its weights.

    Raises PrerequisiteError for what cannot be served: unreadable, no safetensors, made with a prompt that
    this service does not know.
    """
    try:
        manifest, checksum = read_manifest(directory), fingerprint(directory)
        config, stored = open_config(directory)
        own_tokens = _own_tokens(name, config, directory)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is not None:
            positions -= own_tokens
        limits = _saved_limits((directory, directory.parent)) or _limits_of(positions)
    except DamagedCheckpoint as error:
        raise PrerequisiteError(f"{error}; {_remedy(name, directory, run)}") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PrerequisiteError(f"{directory} cannot be read: {reason}; {_remedy(name, directory, run)}") from error
    if positions is not None and limits.max_sequence_tokens > positions:
        raise PrerequisiteError(
            f"{directory} has {positions} positions{_beside(own_tokens)}, too few for prompt.max_prompt_tokens="
            f"{limits.max_prompt_tokens} and prompt.max_response_tokens={limits.max_response_tokens} of its settings"
        )
    return Published(
        name=name,
        run=run,
        directory=directory,
        step=manifest["step"],
        checksum=checksum,
        files=manifest["files"],
        config=config,
        parameters=count_parameters(stored),
        prompt_version=config.prompt_version,
        own_tokens=own_tokens,
        positions=positions,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_new_tokens=limits.max_response_tokens,
    )


def verify_files(model: Published, *, weights: bool) -> None:
    """Hold a directory against its manifest, in both directions: a file that it does not list is refused too.

    Of files in safetensors only the size is looked at. weights: those of the model are read as well; where they are
    loaded by us, `verify_weights` does without reading them again. What else is in safetensors serves to train on.
    Raises PrerequisiteError naming the file and the command that makes the directory anew.
    """
    unread = {name for name in model.files if name.endswith(SAFETENSORS)}
    try:
        if weights:
            unread -= {path.name for path in weight_files(model.directory)}
        verify(model.directory, contents=False)
        for name in sorted(model.files.keys() - unread):
            with storage_errors(model.directory, doing="read"):
                _compare(model, name, sha256(model.directory / name))
        files = (path for path in model.directory.rglob("*") if path.is_file() and not path.name.startswith("."))
        names = {path.relative_to(model.directory).as_posix() for path in files}
    except (DamagedCheckpoint, OSError) as error:
        raise PrerequisiteError(f"{error}; {_remedy(model.name, model.directory, model.run)}") from error
    if strangers := sorted(names - {MANIFEST, *model.files}):
        raise PrerequisiteError(
            f"{model.directory / strangers[0]} is not in {MANIFEST}, so nothing says what it is; move it away"
        )


def verify_weights(model: Published, digests: Mapping[str, str]) -> None:
    """Hold the weights that were loaded against the manifest: digests are those of the very bytes, by file name.

    Raises PrerequisiteError naming the file and the command that makes the directory anew.
    """
    try:
        for name, digest in digests.items():
            _compare(model, name, digest)
    except DamagedCheckpoint as error:
        raise PrerequisiteError(f"{error}; {_remedy(model.name, model.directory, model.run)}") from error


def _compare(model: Published, name: str, digest: str) -> None:
    if name not in model.files or digest != model.files[name]["sha256"]:
        raise DamagedCheckpoint(f"{model.directory / name} has changed since it was written (sha256 differs)")


def _final(run_dir: Path, name: ModelName) -> Path:
    link = run_dir / name / "final"
    try:
        return Path(os.path.realpath(link, strict=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = f"run `python -m rlhf {name} --run {run_dir.resolve().name}` first"
        other = "" if name == "reward" else f", or leave {name} out of APP_MODELS"
        raise PrerequisiteError(f"{link} does not exist; {remedy}{other}") from error
    except OSError as error:
        raise PrerequisiteError(f"{link} cannot be followed: {error.strerror}; check the volume") from error


def _remedy(name: str, directory: Path, run: str) -> str:
    return f"move {directory} aside, then run `python -m rlhf {name} --run {run}`"


def _own_tokens(name: ModelName, config: PretrainedConfig, directory: Path) -> int:
    """Tokens that the model reads before the prompt. Raises PrerequisiteError for an unknown prompt version."""
    _check_prompt_version(name, config, directory)
    return len(framing_of(config).prefix_ids) if name == "reward" else 0


def _beside(own_tokens: int) -> str:
    return f" beside the {own_tokens} tokens that stand before every prompt" if own_tokens else ""


def _check_prompt_version(name: ModelName, config: PretrainedConfig, directory: Path) -> None:
    known = REWARD_VERSIONS if name == "reward" else (PROMPT_VERSION,)
    version = getattr(config, "prompt_version", None)
    if version is None:
        raise PrerequisiteError(
            f"{directory}/config.json names no prompt_version, so nothing says which prompt the model knows; "
            f"train it with this release, whose version is {PROMPT_VERSION!r}"
        )
    if version not in known:
        raise PrerequisiteError(
            f"{directory}/config.json: prompt_version is {version!r}, and this service knows "
            f"{' and '.join(map(repr, known))} alone; serve it with the release that trained it, or train it again"
        )


def _saved_limits(folders: Sequence[Path]) -> PromptConfig | None:
    """The lengths that the run was trained with; PPO keeps its settings in the checkpoint, the others beside it.

    Only this section is read, so that a key which another release had does not matter. Raises ValueError.
    """
    for path in (folder / CONFIG_FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            return PromptConfig.model_validate(settings["prompt"])
        except (yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} does not tell prompt.max_prompt_tokens: {reason}") from error
    return None


def _limits_of(positions: int | None) -> PromptConfig:
    """For a model that comes without settings: the usual summary, and what the model can read beside it."""
    usual = PromptConfig()
    if positions is None:
        return usual
    response = min(usual.max_response_tokens, positions // 2)
    return PromptConfig(max_prompt_tokens=positions - response, max_response_tokens=response)
