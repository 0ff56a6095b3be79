"""The run directory: whole or not at all, verified before it is trusted."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.checkpoint import (
    DamagedCheckpoint,
    StageDir,
    fingerprint,
    read_manifest,
    run_directory,
    storage_errors,
    verify,
    write_text_atomically,
)
from rlhf.errors import PrerequisiteError, StorageError, UsageError


def publish(stage: StageDir, step: int, text: str, **links: bool) -> Path:
    with stage.publish(step, **links) as directory:
        (directory / "weights").write_text(text)
        (directory / "inner").mkdir()
        (directory / "inner" / "more").write_text("more")
    return stage.path / f"step-{step:08d}"


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    return StageDir(tmp_path / "run", "sft")


def test_what_is_published_verifies_and_is_linked(stage: StageDir) -> None:
    publish(stage, 4, "four", final=True, best=True)
    assert sorted(read_manifest(stage.final())["files"]) == ["inner/more", "weights"]
    assert [(stage.path / name).resolve().name for name in ("latest", "best", "final")] == ["step-00000004"] * 3
    assert os.readlink(stage.path / "final") == "step-00000004"
    assert stage.is_final()


def test_what_is_published_can_be_read_by_others(stage: StageDir) -> None:
    with stage.publish(1) as directory:
        (directory / "weights").write_text("one")
        (directory / "weights").chmod(0o600)
    assert (stage.path / "latest" / "weights").stat().st_mode & 0o777 == 0o644


def test_a_failed_block_publishes_nothing_and_leaves_nothing(stage: StageDir) -> None:
    with pytest.raises(RuntimeError), stage.publish(1) as directory:
        (directory / "weights").write_text("half")
        raise RuntimeError
    assert stage.latest() is None
    assert list(stage.path.iterdir()) == []


def test_final_names_the_command_that_makes_it(stage: StageDir) -> None:
    with pytest.raises(PrerequisiteError, match=r"final does not exist; run `python -m rlhf sft --run run` first"):
        stage.final()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_text("fouR"), "has changed since it was written"),
        (lambda file: file.write_text("fo"), "has 2 bytes instead of 4"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_damage_is_found_and_named(stage: StageDir, damage, reason: str) -> None:
    directory = publish(stage, 4, "four", final=True)
    damage(directory / "weights")
    with pytest.raises(PrerequisiteError, match=f"weights {reason}.*move .*step-00000004 aside"):
        stage.final()


def test_a_reader_falls_back_to_the_step_before(stage: StageDir, caplog: pytest.LogCaptureFixture) -> None:
    publish(stage, 1, "one")
    second = publish(stage, 2, "two")
    (second / "weights").write_text("tw0")
    assert stage.latest() == (1, stage.path / "step-00000001")
    assert "passing over a damaged checkpoint" in caplog.text


def test_a_directory_without_a_manifest_is_not_trusted(stage: StageDir) -> None:
    (stage.path / "step-00000003").mkdir(parents=True)
    assert stage.latest() is None
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is missing or unreadable"):
        verify(stage.path / "step-00000003")


def test_prune_keeps_the_newest_and_the_named(stage: StageDir) -> None:
    for step in range(1, 6):
        publish(stage, step, str(step), best=step == 2)
    stage.prune(keep=2)
    assert [step for step, _ in stage.steps()] == [2, 4, 5]


def test_a_step_published_again_replaces_the_first(stage: StageDir) -> None:
    before = fingerprint(publish(stage, 1, "one"))
    after = publish(stage, 1, "two")
    assert (after / "weights").read_text() == "two"
    assert fingerprint(after) != before
    assert [path.name for path in stage.path.iterdir() if path.name.startswith(".")] == []


def test_leftovers_of_a_killed_process_are_removed(stage: StageDir) -> None:
    (stage.path / ".unfinished-00000009-123").mkdir(parents=True)
    (stage.path / ".unfinished-latest-123").symlink_to("step-00000009")
    publish(stage, 1, "one")
    stage.remove_unfinished()
    assert sorted(path.name for path in stage.path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\0b", "-x", "x" * 300, "ü"])
def test_a_run_name_cannot_leave_the_volume(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run name"):
        run_directory(tmp_path, name)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "the volume is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission denied")],
)
def test_what_a_volume_refuses_is_one_line(stage: StageDir, number: int, reason: str) -> None:
    publish(stage, 1, "one")
    with pytest.raises(StorageError, match=f"{reason}.*what was saved before is still good"), stage.publish(2):
        raise OSError(number, "refused")
    assert stage.latest() == (1, stage.path / "step-00000001")
    assert len(stage.steps()) == 1


def test_safetensors_own_error_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(StorageError, match="the volume is full"), storage_errors(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_truly_full_disk(small_volume: Callable[[str], Path]) -> None:
    stage = StageDir(small_volume("256k") / "run", "sft")
    publish(stage, 1, "one", final=True)
    with pytest.raises(StorageError, match="the volume is full"), stage.publish(2) as directory:
        (directory / "weights").write_bytes(bytes(1_000_000))
    assert (stage.final() / "weights").read_text() == "one"
    assert [step for step, _ in stage.steps()] == [1]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a" / "b.json", "one")
    write_text_atomically(tmp_path / "a" / "b.json", "two")
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["two"]
