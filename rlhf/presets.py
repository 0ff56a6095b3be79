"""Configurations from presets, YAML files and `--set` overrides; every mistake is one line that names it.

An unknown key names the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf.config import Config, fields, section_type
from rlhf.errors import ConfigError
from rlhf.quoting import one_line, shown


def preset_names() -> list[str]:
    """The configurations shipped in the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file, apply `key.path=value` overrides and validate.

    A file may begin with `extends: NAME|FILE` and then states only what differs.
    Raises ConfigError naming the key, the value and the nearest right key.
    """
    tree = _read_tree(source, seen=())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {shown(override)} is not of the form key.path=value")
        try:
            value = _parse(text)
        except ValueError as error:
            raise ConfigError(f"--set {one_line(key)}: {shown(text)} is not a YAML value: {error}") from error
        _set_path(tree, key.strip().split("."), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _presets() -> Any:
    return resources.files("rlhf") / "configs"


def _read_tree(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        circle = one_line(" -> ".join((*seen, source)))
        raise ConfigError(f"configurations extend each other in a circle: {circle}")
    is_file = _names_file(source)
    try:
        tree = _parse(_read_text(source) if is_file else _read_preset(source))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{one_line(source)} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{one_line(source)} holds a {type(tree).__name__}, not keys and values")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{one_line(source)}: extends={shown(parent)} is no name of a preset or of a file")
    if is_file and parent.endswith((".yaml", ".yml")):
        parent = str(Path(source).parent / parent)
    return _merge(_read_tree(parent, (*seen, source)), tree)


def _names_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source


def _read_text(source: str) -> bytes:
    """A file's content; the parser finds out its encoding."""
    try:
        return Path(source).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"no configuration file at {one_line(source)}; presets are: {', '.join(preset_names())}"
        ) from error
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise ConfigError(f"{one_line(source)} cannot be read: {one_line(str(error))}") from error


def _read_preset(source: str) -> bytes:
    if source not in preset_names():
        raise ConfigError(f"no preset named {shown(source)}; {_nearest(source, preset_names())}, or give a .yaml file")
    return (_presets() / f"{source}.yaml").read_bytes()


def _parse(text: bytes | str) -> Any:
    """The value of a YAML text. Raises ValueError, in one line, for whatever the parser cannot take."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a date of month 99 is a ValueError
        raise ValueError(one_line(str(error))) from error


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both_trees = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_trees else value
    return merged


def _set_path(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {one_line('.'.join(path))}: {one_line(part)} holds a value, not keys")
        tree = child
    tree[path[-1]] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = _key_path(path)
        if problem["type"] == "extra_forbidden":
            known = [key for key, _ in fields()]
            lines.append(f"unknown key {key}; {_nearest(key, known)}")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{key}={shown(problem['input'])}: {problem['msg']}")
    return one_line("; ".join(dict.fromkeys(lines)))


def _key_path(path: list[str]) -> str:
    """Drop the branch names that pydantic adds for unions."""
    section: Any = Config
    kept = []
    for part in path:
        kept.append(part)
        if section is None or part not in section.model_fields:
            break
        section = section_type(section.model_fields[part].annotation)
        if section is None:
            break
    return ".".join(kept) or "the configuration"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    if not close:
        close = [k for k in known if k.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}"
