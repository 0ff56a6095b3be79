"""A stage by one writer: settings held against the run's, damage noticed, the lease taken and given back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError, StopRequested
from rlhf.lease import LeaseHeld, look, take_lease
from rlhf.pipeline import STAGES, check_settings
from rlhf.running import run_stage
from rlhf.stopping import StopSignal

SFT = next(stage for stage in STAGES if stage.name == "sft")
Program = Callable[[Config, StageDir, StopSignal], None]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[Program], None]:
    """Puts a program in SFT's place."""

    def install(run: Program) -> None:
        module = ModuleType("rlhf.stages.sft")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "rlhf.stages.sft", module)

    return install


def finish(config: Config, stage: StageDir, stop: StopSignal) -> None:
    step = (stage.latest() or (0, None))[0] + 1
    with stage.publish(step, final=True) as directory:
        (directory / "weights").write_text(str(step))


def changed(**sections: dict) -> Config:
    return Config.model_validate(Config().model_dump() | sections)


def test_it_runs_once_and_leaves_the_lease_free(tmp_path: Path, program: Callable[[Program], None]) -> None:
    program(finish)
    assert run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    assert not run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    stage = StageDir(tmp_path / "run", "sft")
    assert (stage.final() / "config.yaml").read_text() == Config().to_yaml()
    claim = look(stage.path).claim
    assert claim is not None
    assert claim.released


def test_leftovers_are_cleared_and_a_failure_frees_the_lease(
    tmp_path: Path, program: Callable[[Program], None]
) -> None:
    left = tmp_path / "run" / "sft" / ".unfinished-00000003-abc"
    left.mkdir(parents=True)

    def fail(config: Config, stage: StageDir, stop: StopSignal) -> None:
        assert not left.exists()
        raise StopRequested("stop")

    program(fail)
    with pytest.raises(StopRequested):
        run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    program(finish)
    assert run_stage(SFT, Config(), tmp_path / "run", StopSignal())


def test_a_second_process_is_turned_away(tmp_path: Path, program: Callable[[Program], None]) -> None:
    program(finish)
    with take_lease(tmp_path / "run" / "sft", seconds=1), pytest.raises(LeaseHeld):
        run_stage(SFT, Config(), tmp_path / "run", StopSignal())


def test_a_finished_stage_that_is_damaged_goes_on_from_the_step_before(
    tmp_path: Path, program: Callable[[Program], None]
) -> None:
    stage = StageDir(tmp_path / "run", "sft")
    with stage.publish(1) as directory:
        (directory / "weights").write_text("1")
    program(finish)
    run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    assert (stage.final() / "weights").read_text() == "2"
    (stage.final() / "weights").write_text("")
    run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    assert (stage.final() / "weights").read_text() == "2"
    assert [path.name[:13] for path in (stage.path / "damaged").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"sft": {"epochs": 3, "loss_on": "all"}}, "sft.epochs was 1.0 and is 3.0 now; sft.loss_on was"),
        ({"runtime": {"precision": "bfloat16"}}, "runtime.precision was 'float32' and is 'bfloat16' now"),
        ({"sft": {"save_every_steps": 7, "micro_batch_size": 2}}, None),
        ({"runtime": {"log_every_steps": 1, "keep_checkpoints": 9, "device": "cpu"}}, None),
        ({"ppo": {"gamma": 0.5}}, None),
    ],
)
def test_changed_settings_are_refused_by_name_unless_they_may_change(
    tmp_path: Path, program: Callable[[Program], None], sections: dict, named: str | None
) -> None:
    def stop_early(config: Config, stage: StageDir, stop: StopSignal) -> None:
        with stage.publish(1):
            pass
        raise StopRequested("stop")

    program(stop_early)
    with pytest.raises(StopRequested):
        run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    program(finish)
    if named is None:
        assert run_stage(SFT, changed(**sections), tmp_path / "run", StopSignal())
    else:
        with pytest.raises(ConfigError, match=named):
            run_stage(SFT, changed(**sections), tmp_path / "run", StopSignal())


def test_a_finished_stage_does_not_fix_the_machine_for_those_after_it(
    tmp_path: Path, program: Callable[[Program], None]
) -> None:
    program(finish)
    run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    assert not run_stage(SFT, changed(runtime={"precision": "bfloat16"}), tmp_path / "run", StopSignal())


def test_settings_of_another_release_count_where_both_know_them(
    tmp_path: Path, program: Callable[[Program], None]
) -> None:
    program(finish)
    run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    path = tmp_path / "run" / "sft" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["sft"]["loss_on"], settings["sft"]["optimizer"]["eps"]
    settings["sft"]["gone"] = 3
    path.write_text(yaml.safe_dump(settings))
    check_settings(Config(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"sft\.loss_on was 'summary' and is 'all' now; go back"):
        check_settings(changed(sft={"loss_on": "all"}), tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[", "- 1", "\x00"])
def test_settings_that_are_damaged_name_the_copy(tmp_path: Path, program: Callable[[Program], None], text: str) -> None:
    program(finish)
    run_stage(SFT, Config(), tmp_path / "run", StopSignal())
    (tmp_path / "run" / "sft" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged; copy config\.yaml from the newest step"):
        run_stage(SFT, Config(), tmp_path / "run", StopSignal())
