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
            raise ConfigError(f"--set {override!r} is not of the form key.path=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: {text!r} is not a YAML value: {_one_line(error)}") from error
        _set_path(tree, key.strip().split("."), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _presets() -> Any:
    return resources.files("rlhf") / "configs"


def _read_tree(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        raise ConfigError(f"configurations extend each other in a circle: {' -> '.join((*seen, source))}")
    is_file = source.endswith((".yaml", ".yml")) or "/" in source
    if is_file:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"no configuration file at {source}; presets are: {', '.join(preset_names())}")
        text = path.read_text(encoding="utf-8")
    elif source in preset_names():
        text = (_presets() / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"no preset named {source!r}; {_nearest(source, preset_names())}, or give a .yaml file")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {_one_line(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} holds a {type(tree).__name__}, not keys and values")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if is_file and str(parent).endswith((".yaml", ".yml")):
        parent = str(Path(source).parent / str(parent))
    return _merge(_read_tree(str(parent), (*seen, source)), tree)


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
            raise ConfigError(f"--set {'.'.join(path)}: {part} holds a value, not keys")
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
            lines.append(f"{key}={problem['input']!r}: {problem['msg']}")
    return "; ".join(dict.fromkeys(lines))


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
