"""The table of all settings, generated from the schemas: `python -m rlhf config --markdown`."""

from __future__ import annotations

import types
import typing
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from rlhf.config import Config, fields

HEADER = """# Configuration

One YAML file a run; `--set key.path=value` changes single keys, and `extends: NAME` at the top of a file
builds on a preset or another file. An unknown key is an error. `python -m rlhf config` prints what a run
would use. This page is generated from the schemas by `make docs`; a test keeps it current.

*Origin* says where a default comes from: the summarize example of trlX 0.7.0, or Huang et al. 2024, "The N+
Implementation Details of RLHF with PPO"; without one it is this project's choice.

A stage that has begun goes on with the settings that it began with; another value is refused by name. Keys marked
*may change* are the exceptions: they change speed, memory, logs or how often something is saved, and what is computed
at most by rounding.
"""


def settings_markdown() -> str:
    """The page `docs/configuration.md`."""
    parts = [HEADER]
    for section, group in groupby(fields(), key=lambda item: item[0].rpartition(".")[0].partition(".")[0]):
        parts.append(_heading(section))
        parts.append("| key | meaning | unit | values | default | origin |\n| --- | --- | --- | --- | --- | --- |\n")
        for key, info in group:
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            default = _default_text(info.get_default(call_default_factory=True))
            meaning = f"{info.description or ''}{' (*may change*)' if extra['may_change'] else ''}"
            cells = [f"`{key}`", meaning, extra["unit"], type_name(info.annotation), default]
            parts.append("| " + " | ".join(str(cell) for cell in [*cells, extra["origin"]]) + " |\n")
    return "".join(parts)


def _heading(section: str) -> str:
    if not section:
        return "\n## Run\n\n"
    schema = Config.model_fields[section].annotation
    return f"\n## `{section}`\n\n{(schema.__doc__ or '').strip()}\n\n"


def type_name(annotation: Any) -> str:
    """What values an annotation allows, in words for people."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("empty" if a is type(None) else type_name(a) for a in typing.get_args(annotation))
    if origin is tuple:
        return "list of " + type_name(typing.get_args(annotation)[0])
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default_text(value: Any) -> str:
    return "" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
