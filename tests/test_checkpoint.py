"""The run directory: whole or not at all, verified before it is trusted."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rlhf.checkpoint import (
    DamagedCheckpoint,
    StageDir,
    fingerprint,
    read_manifest,
    run_directory,
    verify,
)
from rlhf.errors import PrerequisiteError, StorageError, UsageError
from rlhf.lease import LeaseLost, take_lease
from rlhf.storage import storage_errors, write_text_atomically


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
    with pytest.raises(
        PrerequisiteError, match=f"weights {reason}.*verify run --repair`.*, then run `python -m rlhf sft"
    ):
        stage.final()


def test_a_reader_falls_back_to_the_step_before(stage: StageDir, caplog: pytest.LogCaptureFixture) -> None:
    publish(stage, 1, "one")
    second = publish(stage, 2, "two")
    (second / "weights").write_text("tw0")
    assert stage.latest() == (1, stage.path / "step-00000001")
    assert "passing over a damaged checkpoint" in caplog.text


def test_a_directory_without_a_manifest_is_not_trusted(stage: StageDir) -> None:
    publish(stage, 1, "one")
    (stage.path / "step-00000003").mkdir(parents=True)
    assert stage.latest() == (1, stage.path / "step-00000001")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is missing or unreadable"):
        verify(stage.path / "step-00000003")


def test_prune_keeps_the_newest_and_the_named(stage: StageDir) -> None:
    for step in range(1, 6):
        publish(stage, step, str(step), best=step == 2)
    stage.prune(keep=2)
    assert [step for step, _ in stage.steps()] == [2, 4, 5]


def test_a_step_published_again_never_replaces_the_first_in_place(stage: StageDir) -> None:
    before = publish(stage, 1, "one")
    publish(stage, 1, "two")
    assert [(step, path.name) for step, path in stage.steps()] == [(1, "step-00000001"), (1, "step-00000001.1")]
    assert (before / "weights").read_text() == "one"
    assert (stage.path / "latest" / "weights").read_text() == "two"
    assert fingerprint(before) != fingerprint(stage.path / "latest")
    publish(stage, 2, "three")
    stage.prune(keep=2)
    assert [path.name for _, path in stage.steps()] == ["step-00000001.1", "step-00000002"]


def test_revisions_count_on_beyond_nine(stage: StageDir) -> None:
    for number in range(12):
        publish(stage, 1, str(number))
    assert stage.latest() == (1, stage.path / "step-00000001.11")


def test_prune_keeps_what_any_link_names(stage: StageDir) -> None:
    for step in range(1, 5):
        publish(stage, step, str(step), best=step == 1, final=step == 2)
    stage.point("latest", "step-00000003")
    stage.prune(keep=1)
    assert [step for step, _ in stage.steps()] == [1, 2, 3, 4]


def test_who_reads_final_is_not_disturbed_by_who_writes(held: StageDir) -> None:
    publish(held, 1, "one", final=True)
    reader, done, read = StageDir(held.run_dir, "sft"), threading.Event(), []

    def read_on() -> None:
        while not done.is_set():
            read.append((reader.final().resolve() / "weights").read_text())

    thread = threading.Thread(target=read_on)
    thread.start()
    for step in range(2, 40):
        publish(held, step, str(step), best=step % 3 == 0)
        held.prune(keep=1)
        held.write_text("progress.json", str(step))
    done.set()
    thread.join()
    assert len(read) > 5
    assert set(read) == {"one"}


def test_settings_lie_in_every_directory(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "run", "sft", settings="seed: 7\n")
    directory = publish(stage, 1, "one")
    assert (directory / "config.yaml").read_text() == "seed: 7\n"
    assert "config.yaml" in read_manifest(directory)["files"]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[StageDir]:
    with take_lease(tmp_path / "run" / "sft", seconds=60) as lease:
        yield StageDir(tmp_path / "run", "sft", lease=lease)


def test_who_holds_the_lease_sets_damage_aside_and_deletes_nothing(held: StageDir) -> None:
    publish(held, 1, "one")
    for step in (2, 3):
        publish(held, step, "xxx")
        (held.path / f"step-{step:08d}" / "weights").write_text("yyy")
    assert held.latest() == (1, held.path / "step-00000001")
    assert [step for step, _ in held.steps()] == [1]
    aside = sorted((held.path / "damaged").iterdir())
    assert [path.name.split("-")[1] for path in aside] == ["00000002", "00000003"]
    assert [(path / "weights").read_text() for path in aside] == ["yyy", "yyy"]


@pytest.mark.parametrize("what", ["all damaged", "a link to nothing"])
def test_without_any_good_step_the_remedy_is_named_and_nothing_begins_anew(held: StageDir, what: str) -> None:
    directory = publish(held, 1, "one")
    if what == "all damaged":
        (directory / "manifest.json").write_text("{}")
    else:
        shutil.rmtree(directory)
    with pytest.raises(PrerequisiteError, match=r"verify run --repair.*again from its beginning") as caught:
        held.latest()
    assert caught.value.exit_code == 66


def test_who_looks_while_another_prunes_looks_again(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(stage, 1, "one")
    listed = stage.steps()
    publish(stage, 2, "two")
    stage.prune(keep=1)
    answers = iter([listed, *[stage.steps()] * 9])
    monkeypatch.setattr(stage, "steps", lambda: next(answers))
    assert stage.latest() == (2, stage.path / "step-00000002")


def test_a_stale_link_is_passed_over(held: StageDir, caplog: pytest.LogCaptureFixture) -> None:
    publish(held, 1, "one")
    held.point("latest", "step-00000009")
    assert held.latest() == (1, held.path / "step-00000001")
    assert "leads nowhere" in caplog.text


@pytest.mark.parametrize(
    "write",
    [
        lambda stage: publish(stage, 2, "two"),
        lambda stage: stage.point("best", "step-00000001"),
        lambda stage: stage.prune(keep=1),
        lambda stage: stage.write_text("progress.json", "{}"),
        lambda stage: stage.set_aside(stage.path / "step-00000000"),
        lambda stage: stage.unlink("latest"),
        lambda stage: stage.check(),
    ],
    ids=["publish", "point", "prune", "write_text", "set_aside", "unlink", "check"],
)
def test_who_was_taken_over_changes_nothing(held: StageDir, write: Callable[[StageDir], object]) -> None:
    publish(held, 0, "zero")
    publish(held, 1, "one")
    fenced = held.room.with_name(".fenced-here")
    held.room.rename(fenced)
    shutil.rmtree(fenced)

    def seen() -> list[str]:
        return sorted(path.name for path in held.path.iterdir() if not path.name.startswith("."))

    before = seen()
    with pytest.raises(LeaseLost, match=r"taken over by another process.*let that one go on"):
        write(held)
    assert seen() == before


def test_a_writer_that_is_overtaken_in_the_middle_of_a_save_shows_nothing(held: StageDir) -> None:
    """A library that makes the folder again, as save_pretrained does, does not open the door again."""
    with pytest.raises(LeaseLost), held.publish(5) as directory:
        fenced = held.room.with_name(".fenced-here")
        held.room.rename(fenced)
        shutil.rmtree(fenced)
        directory.mkdir(parents=True)
        (directory / "weights").write_text("late")
    assert held.steps() == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_volume_that_cannot_be_read_just_now_is_no_damage(
    held: StageDir, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(held, 1, "one")

    def refuse(path: Path) -> str:
        raise OSError(number, "refused")

    monkeypatch.setattr("rlhf.checkpoint.sha256", refuse)
    with pytest.raises(StorageError, match="cannot read below"):
        held.latest()
    monkeypatch.undo()
    assert held.latest() == (1, held.path / "step-00000001")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"step": 1, "stage": "sft", "files": []}', '{"step": 1, "stage": "sft", "files": {"w": {}}}',
     '{"step": true, "stage": "sft", "files": {}}', "[" * 100_000,
     '{"step": 1, "stage": "sft", "files": {"../../x": {"size": 1, "sha256": "a"}}}'],
)  # fmt: skip
def test_what_is_no_manifest_is_damage(stage: StageDir, text: str) -> None:
    directory = publish(stage, 1, "one")
    (directory / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="manifest"):
        verify(directory)


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


@pytest.mark.parametrize("kind", [SafetensorError, Exception], ids=["safetensors", "tokenizers"])
def test_libraries_own_errors_of_a_full_disk_are_understood(tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(StorageError, match="the volume is full"), storage_errors(tmp_path):
        raise kind("I/O error: No space left on device (os error 28)")


def test_other_errors_that_mention_a_number_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), storage_errors(tmp_path):
        raise RuntimeError("os error 28")


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
