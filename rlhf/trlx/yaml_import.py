"""A trlX configuration, as a file, made one of ours. Needs no trlX."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import ConfigError
from rlhf.presets import load_config
from rlhf.quoting import one_line
from rlhf.trlx.translate import translate
from rlhf.trlx.translation import Translation

_NESTED = (
    "optimizer.kwargs",
    "scheduler.kwargs",
    "method.gen_kwargs",
    "method.gen_experience_kwargs",
    "model.peft_config",
)
_OLDER = {
    "model.tokenizer_path": "tokenizer.tokenizer_path",
    "train.n_ctx": "train.seq_length",
    "train.lr_init": "optimizer.kwargs.lr",
    "train.learning_rate_init": "optimizer.kwargs.lr",
    "train.lr_target": "scheduler.kwargs.eta_min",
    "train.learning_rate_target": "scheduler.kwargs.eta_min",
    "train.lr_decay_steps": "scheduler.kwargs.T_max",
    "train.opt_betas": "optimizer.kwargs.betas",
    "train.opt_eps": "optimizer.kwargs.eps",
    "train.weight_decay": "optimizer.kwargs.weight_decay",
}
"""Where trlX 0.2 to 0.4 had keys of today; source: configs/ppo_config.yml in CarperAI/trlx at those tags."""
_MAX_BYTES = 2**20


def imported(path: Path, *, processes: int = 1) -> str:
    """Our YAML for a trlX configuration, valid for `--config`, with remarks.

    Raises ConfigError for a file that is no trlX configuration, or gives values that ours cannot have.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes} must be 1 or more")
    translation = translate(read_trlx(path), processes=processes)
    text = render(translation, name=path.name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            load_config(str(file))
        except ConfigError as error:
            raise ConfigError(f"{path}: what it says is not possible here: {error}") from error
    return text


def read_trlx(path: Path) -> dict[str, Any]:
    """A trlX YAML by dotted keys, in today's layout. Raises ConfigError where it cannot be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is longer than {_MAX_BYTES} bytes; a trlX configuration is not")
        tree = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(str(error))}") from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name), dict) for name in ("model", "train", "method")):
        raise ConfigError(f"{path} is no trlX configuration: it lacks the sections model, train or method")
    flat = dict(_flat(tree))
    for old, new in _OLDER.items():
        if old in flat:
            flat.setdefault(new, flat.pop(old))
    return flat


def render(translation: Translation, *, name: str) -> str:
    """The translation as YAML: what was lost on top, remarks at the ends of lines."""
    lines = [f"# Made of {one_line(name)}, a configuration of trlX, by `rlhf import-trlx`."]
    if translation.lost:
        lines.append("# Without a counterpart:")
        lines += [f"#   {one_line(lost)}" for lost in translation.lost]
    open_sections: list[str] = []
    for key in _grouped(translation.ours):
        *sections, last = key.split(".")
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        lines += [f"{'  ' * depth}{sections[depth]}:" for depth in range(shared, len(sections))]
        open_sections = sections
        remark = f"  # {one_line(translation.remarks[key])}" if key in translation.remarks else ""
        lines.append(f"{'  ' * len(sections)}{last}: {_scalar(translation.ours[key])}{remark}")
    return "\n".join(lines) + "\n"


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and (not prefix or key in _NESTED):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _grouped(ours: Mapping[str, Any]) -> list[str]:
    """The keys in an order in which each section stands once, its own keys before its sections'."""
    first: dict[tuple[str, ...], int] = {}
    for place, key in enumerate(ours):
        sections = key.split(".")[:-1]
        for depth in range(len(sections) + 1):
            first.setdefault(tuple(sections[:depth]), place)

    def order(key: str) -> tuple[tuple[int, int], ...]:
        sections = key.split(".")[:-1]
        within = [(1, first[tuple(sections[: depth + 1])]) for depth in range(len(sections))]
        return (*within, (0, list(ours).index(key)))

    return sorted(ours, key=order)


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").rstrip("\n")
