"""One stage from its beginning to its end, or on from where an earlier process left it, by one writer."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.checkpoint import CONFIG_FILE, StageDir
from rlhf.config import Config
from rlhf.lease import take_lease
from rlhf.pipeline import Stage, check_settings
from rlhf.processes import is_first_process
from rlhf.runtime import from_first
from rlhf.stopping import StopSignal

logger = logging.getLogger(__name__)


def run_stage(stage: Stage, config: Config, run_dir: Path, stop: StopSignal) -> bool:
    """Run one stage to its end; False when it had finished before.

    Raises ConfigError when the run began with other settings than these, LeaseHeld while another process is at work
    on the stage.
    """
    check_settings(config, run_dir)
    if from_first(StageDir(run_dir, stage.name).is_whole):
        logger.info("stage=%s is already done path=%s", stage.name, run_dir / stage.name / "final")
        return False
    with _writer(stage, config, run_dir, stop) as directory:
        program = importlib.import_module(f"rlhf.stages.{stage.name}")
        program.run(config, directory, stop)
    return True


@contextmanager
def _writer(stage: Stage, config: Config, run_dir: Path, stop: StopSignal) -> Iterator[StageDir]:
    """The stage's folder, held by the first process, cleared of what killed processes left."""
    settings = config.to_yaml()
    lease = None

    def begin() -> None:
        nonlocal lease
        lease = take_lease(run_dir / stage.name, seconds=config.runtime.lease_seconds)
        lease.on_lost = stop.request

    from_first(begin)
    try:
        directory = StageDir(run_dir, stage.name, lease=lease, settings=settings)
        if is_first_process():
            directory.remove_unfinished()
            directory.write_text(CONFIG_FILE, settings)
            if directory.is_final():
                _set_final_aside(directory)
        yield directory
    finally:
        if lease is not None:
            lease.release()


def _set_final_aside(directory: StageDir) -> None:
    target = directory.named("final")
    directory.unlink("final")
    if target:
        directory.set_aside(directory.path / target)
