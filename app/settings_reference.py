"""The table of the service's settings, generated from the schema: `python -m app settings`."""

from __future__ import annotations

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.settings import Settings, variable
from rlhf.config_reference import type_name

HEADER = """# Settings of the service

Environment variables of `python -m app`. An empty one counts as not set; an unknown `APP_*` variable is an
error, as is a wrong value: the service ends with exit code 78 and one line that names it. This page is generated
from the schema by `make docs`; a test keeps it current.
"""

SECTIONS = {
    "run_dir": "What is served",
    "slots": "How much at once",
    "host": "Who may ask",
    "max_connections": "Connections",
    "stall_seconds": "What is told",
}
"""The first setting of each section."""


def settings_markdown() -> str:
    """The page `docs/service-settings.md`."""
    parts = [HEADER]
    for name, info in Settings.model_fields.items():
        if name in SECTIONS:
            parts.append(f"\n## {SECTIONS[name]}\n\n")
            parts.append("| variable | meaning | unit | values | default |\n| --- | --- | --- | --- | --- |\n")
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        cells = [f"`{variable(name)}`", info.description, extra["unit"], type_name(info.annotation), _default(info)]
        parts.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return "".join(parts)


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "must be set"
    if isinstance(info.default, tuple):
        return ",".join(info.default)
    if isinstance(info.default, bool):
        return str(info.default).lower()
    return "" if info.default is None else str(info.default)
