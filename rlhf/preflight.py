"""`rlhf check STAGE`: what a stage needs, looked at within seconds, before anything waits for it.

Settings, the stages before it, the volume, the GPUs: a line for each, and the first that is wrong ends it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError, PrerequisiteError, StorageError, UnavailableError
from rlhf.gpus import needed_cuda, visible_gpus
from rlhf.launcher.layout import number, usable_gpus
from rlhf.pipeline import STAGES, Stage, check_settings
from rlhf.placement import check_dedicated, service_url
from rlhf.shares import check_shares
from rlhf.trlx.settings import check_settings as check_trlx_settings
from rlhf.vllm_limits import check_ppo_sampler


def check(stage: str, config: Config, run_dir: Path, *, gpus: int | None) -> Iterator[str]:
    """Look at everything in order, a line for each; raises the error that the stage itself would end with.

    gpus is how many have to be visible; None: what RLHF_GPUS says, 0 where it says nothing.
    """
    asked = number(gpus, "--gpus", "RLHF_GPUS") or 0
    if run_dir.parent.is_dir() and not os.access(run_dir.parent, os.R_OK | os.X_OK):
        raise StorageError(f"{run_dir.parent} cannot be read; {_who(run_dir.parent)}")
    nodes = number(None, "--nodes", "RLHF_NODES", least=1) or 1
    check_settings(config, run_dir)
    program = next(one for one in STAGES if one.name == stage)
    placement = config.ppo.reward_placement if stage == "ppo" else "colocated"
    dedicated = placement == "dedicated"
    processes = number(None, "--processes", "RLHF_PROCESSES", least=1) or (1 if dedicated else max(asked, 1))
    processes = nodes * processes if program.parallel else 1
    if dedicated:
        check_dedicated(gpus=0 if config.runtime.device == "cpu" else asked, processes=processes)
    if placement == "remote":
        service_url(config.ppo.remote)
    if stage == "ppo" and config.ppo.engine == "trlx":
        check_trlx_settings(config, processes=processes)
    if stage == "ppo":
        check_ppo_sampler(config.ppo)
    check_shares(config, stage, processes)
    yield f"settings: they fit run {run_dir.name} and {processes} process(es)"
    yield from check_prerequisites(program, run_dir)
    yield check_volume(run_dir.parent, run_dir / stage)
    yield check_gpus(asked, device=config.runtime.device)


def check_prerequisites(stage: Stage, run_dir: Path) -> Iterator[str]:
    """Whether the stages that this one reads have finished and their files are there, by size.

    Raises PrerequisiteError naming the first to run.
    """
    for name in stage.reads:
        try:
            final = StageDir(run_dir, name).final_at_a_glance()
        except PrerequisiteError as error:
            raise PrerequisiteError(f"{stage.name} needs {name}: {error}") from error
        yield f"{name}: finished, {final.resolve()}"


def check_volume(runs_dir: Path, directory: Path) -> str:
    """Whether this user can make, sync, rename, link to and remove a file in `directory`, or where it will be made.

    Raises StorageError.
    """
    while directory != runs_dir and not directory.exists():
        directory = directory.parent
    probe = directory / f".check-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with probe.open("w", encoding="utf-8") as file:
            file.write("written by `rlhf check`\n")
            file.flush()
            os.fsync(file.fileno())
        _check_links(probe)
        probe.rename(probe.with_suffix(".renamed")).unlink()
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}; {_who(directory)}") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return f"volume: {directory} can be written"


def _check_links(probe: Path) -> None:
    """`final` and its like are symbolic links, replaced by renames. Raises StorageError for a volume without."""
    link, again = probe.with_suffix(".link"), probe.with_suffix(".again")
    try:
        link.symlink_to(probe.name)
        again.symlink_to(probe.name)
        os.replace(again, link)
    except OSError as error:
        raise StorageError(
            f"{probe.parent} takes no symbolic links ({error.strerror}); use a volume that does: NFS, CephFS or "
            "Lustre, not SMB"
        ) from error
    finally:
        for path in (link, again):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def check_gpus(asked: int, *, device: str) -> str:
    """Whether as many GPUs are visible as were asked for, with a driver that knows torch's CUDA.

    Raises UnavailableError when the node lacks them, ConfigError when settings or the image do.
    """
    needed = needed_cuda()
    if asked and device != "cpu" and needed is None:
        raise ConfigError(f"{asked} GPUs asked for, but this torch is built without CUDA; use the CUDA image")
    if usable_gpus(asked, device=device) == 0:
        return "GPUs: none to be used"
    known = visible_gpus().driver_cuda
    if needed is not None and known // 1000 < int(needed.partition(".")[0]):
        raise UnavailableError(
            f"this node's driver knows CUDA {_cuda(known)}, but torch needs {needed}; update the driver"
        )
    return f"GPUs: {asked} visible, driver for CUDA {_cuda(known)}, torch for {needed}"


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _who(path: Path) -> str:
    """Who we are and whose the folder is, and what mends it."""
    while not path.exists():
        path = path.parent
    status = path.stat()
    return (
        f"we are user {os.getuid()} group {os.getgid()}, it belongs to {status.st_uid}:{status.st_gid} "
        f"with mode {status.st_mode & 0o7777:04o}; give the pod's fsGroup write access to it"
    )
