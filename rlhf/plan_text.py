"""A memory plan as a person reads it, and as a program does. GB are 10^9 bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.memory_advice import GPUS, Advice, changed
from rlhf.memory_plan import SPREAD, Machine, StagePlan, other_strategies, plan_run
from rlhf.memory_strategy import Parts
from rlhf.model_shape import ModelShape
from rlhf.shares import check_shares

GB = 10**9


def as_text(
    config: Config, shape: ModelShape, machine: Machine, plans: Sequence[StagePlan], advice: Sequence[Advice]
) -> Iterator[str]:
    """The lines of a plan: its verdict by stage, what it is made of, the other strategies, and what to change."""
    yield (
        f"{shape.name}: {shape.family}, {shape.policy_numbers:,} parameters; {machine.nodes} node(s) of {machine.gpus} "
        f"{'GPU(s)' if machine.device == 'cuda' else 'process(es)'} with {_gb(machine.gpu_memory)}; "
        f"{config.prompt.max_sequence_tokens} tokens a sequence, {config.runtime.precision}"
    )
    yield ""
    yield from _table(_verdicts(plans))
    for plan in plans:
        yield ""
        peak = plan.need.peak
        yield f"{plan.stage}, fullest at {peak.name}: {_parts(peak.parts | {'margin': plan.margin})}"
        yield f"  host memory of the first node {_gb(plan.host_total)}: {_parts(plan.host)}"
        if note := _undivided(plan.stage, config, machine):
            yield f"  note: {note}"
    yield ""
    yield from _table(_strategies(config, shape, machine))
    for one in advice:
        yield ""
        yield from _told(one)
    if advice:
        yield ""
        yield _together(config, shape, machine, advice)


def as_json(
    config: Config, shape: ModelShape, machine: Machine, plans: Sequence[StagePlan], advice: Sequence[Advice]
) -> dict[str, Any]:
    """The same, in bytes."""
    others = {name: [_plain(plan) for plan in other_strategies(name, config, shape, machine)] for name in SPREAD}
    told = {
        one.after.stage: {"changes": one.changes, "fits": one.after.fits, "after": _plain(one.after)} for one in advice
    }
    return {
        "model": {"name": shape.name, "family": shape.family, "parameters": shape.policy_numbers},
        "fits": all(plan.fits for plan in plans),
        "stages": {plan.stage: _plain(plan) for plan in plans},
        "strategies": others,
        "advice": told,
    }


def _plain(plan: StagePlan) -> dict[str, Any]:
    return {
        "strategy": plan.strategy,
        "fits": plan.fits,
        "device_bytes": plan.total,
        "device_spare_bytes": plan.spare,
        "phases": {phase.name: phase.parts for phase in plan.need.phases},
        "fullest": plan.need.peak.name,
        "margin_bytes": plan.margin,
        "host_bytes": plan.host,
        "host_spare_bytes": plan.host_spare,
    }


def _verdicts(plans: Iterable[StagePlan]) -> Iterator[list[str]]:
    yield ["stage", "strategy", "needs", "spare", "host", "fits"]
    for plan in plans:
        strategy = plan.strategy if plan.stage in SPREAD else "-"
        yield [plan.stage, strategy, _gb(plan.total), _gb(plan.spare), _gb(plan.host_total), _fits(plan)]


def _strategies(config: Config, shape: ModelShape, machine: Machine) -> Iterator[list[str]]:
    rows = {stage: list(other_strategies(stage, config, shape, machine)) for stage in SPREAD}
    yield ["under each strategy", *(plan.strategy for plan in next(iter(rows.values())))]
    for stage, plans in rows.items():
        yield [stage, *(f"{_gb(plan.total)} {'' if plan.fits else 'no'}".strip() for plan in plans)]


def _told(advice: Advice) -> Iterator[str]:
    plan = advice.after
    if plan.fits:
        yield f"{plan.stage} fits, with {_gb(plan.spare)} to spare, after:"
    elif advice.changes:
        yield f"{plan.stage} fits after nothing known here; it would need {_gb(plan.total)} a GPU with:"
    else:
        yield f"{plan.stage} fits after nothing known here; it needs GPUs with {_gb(plan.total)}"
    yield from (f"  {_change(key, value)}" for key, value in advice.changes.items())


def _together(config: Config, shape: ModelShape, machine: Machine, advice: Sequence[Advice]) -> str:
    """Whether all stages fit with all changes; of two values for a key the smaller one, of GPUs the larger number."""
    changes: dict[str, Any] = {}
    for key, value in (item for one in advice for item in one.changes.items()):
        choose = max if key == GPUS else min
        changes[key] = choose(value, changes[key]) if key in changes else value
    try:
        plans = plan_run(*_placed(config, shape, machine, changes))
    except ConfigError as error:
        return f"all of these together contradict one another: {error}"
    lacking = [plan.stage for plan in plans if not plan.fits]
    words = " ".join(f"--set {key}={_value(value)}" for key, value in changes.items() if key != GPUS)
    words += f" {GPUS} {changes[GPUS]}" if GPUS in changes else ""
    if lacking:
        return f"with all of these {', '.join(lacking)} would still not fit"
    return f"with all of these every stage fits: {words.strip()}"


def _placed(
    config: Config, shape: ModelShape, machine: Machine, changes: dict[str, Any]
) -> tuple[Config, ModelShape, Machine]:
    new_config, new_machine = changed(config, machine, changes)
    return new_config, shape, new_machine


def _change(key: str, value: Any) -> str:
    return f"{GPUS} {value}" if key == GPUS else f"{key}: {_value(value)}"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _undivided(stage: str, config: Config, machine: Machine) -> str:
    """What the stage itself will say of batches that do not divide; empty where they do."""
    try:
        check_shares(config, stage, machine.nodes * machine.gpus)
    except ConfigError as error:
        return str(error)
    return ""


def _fits(plan: StagePlan) -> str:
    if plan.fits:
        return "yes"
    return "no" if plan.spare < 0 else "no: host memory"


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB" if abs(size) >= GB else f"{size / 10**6:.0f} MB"


def _parts(parts: Parts) -> str:
    largest = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {_gb(size)}" for name, size in largest if size)


def _table(rows: Iterable[list[str]]) -> Iterator[str]:
    """Columns, the first to the left, numbers to the right."""
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        words = [
            cell.ljust(size) if column < 1 else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(words).rstrip()
