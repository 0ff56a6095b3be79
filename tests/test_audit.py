"""`rlhf verify`: every kind of damage is found and named; `--repair` moves it aside and deletes nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import audit
from rlhf.audit import Reader, verify_run
from rlhf.checkpoint import MANIFEST, StageDir
from rlhf.errors import PrerequisiteError, StorageError
from rlhf.lease import LeaseHeld, take_lease
from rlhf.repair import repair_run

OLD, NEW = "step-00000001", "step-00000002"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two stages: `sft` has finished with two steps, the older one best; `reward` has saved once."""
    run_dir = tmp_path / "runs" / "demo"
    publish(run_dir, "sft", 1, "one", best=True)
    publish(run_dir, "sft", 2, "two", final=True)
    publish(run_dir, "reward", 3, "three")
    (run_dir / "sft" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run_dir / "sft" / "progress.json").write_text("{}")
    return run_dir


def publish(run_dir: Path, stage: str, step: int, text: str, *, final: bool = False, best: bool = False) -> None:
    with StageDir(run_dir, stage).publish(step, final=final, best=best) as directory:
        (directory / "weights").write_text(text * 1000)
        (directory / "inner").mkdir()
        (directory / "inner" / "more").write_text("more")


def verified(run_dir: Path) -> tuple[int, list[str]]:
    lines: list[str] = []
    return verify_run(run_dir, say=lines.append), lines


def repaired(run_dir: Path) -> tuple[int, list[str]]:
    lines: list[str] = []
    return repair_run(run_dir, say=lines.append), lines


def contents(run_dir: Path) -> list[bytes]:
    """Everything that any file below says, but for leases."""
    found = (path for path in run_dir.rglob("*") if path.is_file() and path.name != "lease.json")
    return sorted({path.resolve(): path.read_bytes() for path in found}.values())


def flip_a_bit(directory: Path) -> None:
    data = bytearray((directory / "weights").read_bytes())
    data[500] ^= 4
    (directory / "weights").write_bytes(data)


def truncate(directory: Path) -> None:
    os.truncate(directory / "weights", 40)


def lose_a_file(directory: Path) -> None:
    (directory / "inner" / "more").unlink()


def lose_the_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


def tear_the_manifest(directory: Path) -> None:
    os.truncate(directory / MANIFEST, 50)


def lose_all_but_the_manifest(directory: Path) -> None:
    (directory / "weights").unlink()
    (directory / "inner" / "more").unlink()


def empty_the_manifest(directory: Path) -> None:
    lose_all_but_the_manifest(directory)
    (directory / MANIFEST).write_text(json.dumps({"stage": "sft", "step": 2, "files": {}}))


def empty_the_directory(directory: Path) -> None:
    lose_all_but_the_manifest(directory)
    (directory / "inner").rmdir()
    lose_the_manifest(directory)


def swap_for_another_step(directory: Path) -> None:
    for name in ("weights", MANIFEST):
        (directory / name).write_bytes((directory.parent / OLD / name).read_bytes())


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "weights has changed since it was written",
    truncate: "weights has 40 bytes instead of 3000",
    lose_a_file: "inner/more is missing",
    lose_the_manifest: "manifest.json is missing or unreadable",
    tear_the_manifest: "manifest.json is missing or unreadable",
    lose_all_but_the_manifest: "inner/more is missing; weights is missing",
    empty_the_manifest: "manifest.json lists no files",
    empty_the_directory: "is empty",
    swap_for_another_step: "manifest.json is that of stage sft, step 1",
}


def test_a_good_run_has_a_line_for_each_directory(run_dir: Path) -> None:
    code, lines = verified(run_dir)
    assert code == 0
    assert [line.split()[:3] for line in lines[:3]] == [
        ["sft", OLD, "ok"],
        ["sft", NEW, "ok"],
        ["reward", "step-00000003", "ok"],
    ]
    assert lines[0].endswith("2 files, 3.0 kB")
    assert lines[3:] == ["2 stages, 3 directories, 6 files, 11.0 kB: all good"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_changes_nothing(run_dir: Path, damage: Callable[[Path], None]) -> None:
    damage(run_dir / "sft" / NEW)
    before = contents(run_dir), sorted(run_dir.rglob("*"))
    code, lines = verified(run_dir)
    assert code == 65
    assert lines[1].split()[:3] == ["sft", NEW, "damaged"]
    assert DAMAGES[damage] in lines[1]
    assert f"leads to {NEW}, which is damaged" in "\n".join(lines)
    assert (contents(run_dir), sorted(run_dir.rglob("*"))) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_repair_moves_it_aside_and_leads_to_the_newest_good_one(run_dir: Path, damage: Callable[[Path], None]) -> None:
    damage(run_dir / "sft" / NEW)
    before = contents(run_dir)
    code, lines = repaired(run_dir)
    assert code == 0
    sft = StageDir(run_dir, "sft")
    assert [path.name for _, path in sft.steps()] == [OLD]
    assert os.readlink(sft.path / "latest") == os.readlink(sft.path / "best") == OLD
    assert not os.path.lexists(sft.path / "final")
    assert sft.latest() == (1, sft.path / OLD)
    assert contents(run_dir) == before
    assert any("python -m rlhf sft --run demo" in line for line in lines)
    assert verified(run_dir)[0] == 0


def test_no_good_one_left_begins_anew(run_dir: Path) -> None:
    flip_a_bit(run_dir / "reward" / "step-00000003")
    assert repaired(run_dir)[0] == 0
    reward = StageDir(run_dir, "reward")
    assert not os.path.lexists(reward.path / "latest")
    assert reward.latest() is None
    assert len(list((reward.path / "damaged").iterdir())) == 2  # the directory and the link


def test_final_moves_to_the_newest_identical_revision(run_dir: Path) -> None:
    publish(run_dir, "sft", 2, "two")
    publish(run_dir, "sft", 2, "other")
    flip_a_bit(run_dir / "sft" / NEW)
    assert repaired(run_dir)[0] == 0
    assert os.readlink(run_dir / "sft" / "final") == f"{NEW}.1"
    assert os.readlink(run_dir / "sft" / "latest") == f"{NEW}.2"


@pytest.mark.parametrize("name", ["latest", "best", "final"])
def test_a_link_that_leads_nowhere(run_dir: Path, name: str) -> None:
    link = run_dir / "sft" / name
    link.unlink()
    link.symlink_to("step-00000009")
    code, lines = verified(run_dir)
    assert code == 65
    assert any(name in line and "leads to step-00000009, which is not there" in line for line in lines)
    assert repaired(run_dir)[0] == 0
    assert os.path.lexists(link) == (name == "latest")
    assert os.readlink(run_dir / "sft" / "latest") == NEW


def test_a_stale_or_missing_latest(run_dir: Path) -> None:
    link = run_dir / "sft" / "latest"
    link.unlink()
    assert "latest" in verified(run_dir)[1][2]
    link.symlink_to(OLD)
    code, lines = verified(run_dir)
    assert code == 65
    assert f"leads to {OLD}; the newest good directory is {NEW}" in lines[2]
    assert repaired(run_dir)[0] == 0
    assert os.readlink(link) == NEW


def test_a_link_out_of_the_stage_is_not_followed(run_dir: Path) -> None:
    link = run_dir / "reward" / "best"
    link.symlink_to(f"../sft/{NEW}")
    assert verified(run_dir)[0] == 65
    assert repaired(run_dir)[0] == 0
    assert (run_dir / "sft" / NEW / "weights").is_file()
    assert not os.path.lexists(link)


def test_a_directory_in_the_place_of_a_link(run_dir: Path) -> None:
    (run_dir / "sft" / "final").unlink()
    (run_dir / "sft" / "final").mkdir()
    (run_dir / "sft" / "final" / "mine").write_text("keep me")
    assert verified(run_dir)[0] == 65
    before = contents(run_dir)
    assert repaired(run_dir)[0] == 0
    assert contents(run_dir) == before


def test_a_file_that_the_manifest_does_not_list_is_moved_alone(run_dir: Path) -> None:
    (run_dir / "sft" / NEW / "inner" / "pytorch_model.bin").write_bytes(b"pickle")
    (run_dir / "sft" / NEW / ".nfs0001").write_bytes(b"deleted while open")
    code, lines = verified(run_dir)
    assert code == 65
    assert any(f"{NEW}/inner/pytorch_model.bin" in line and "is not in the manifest" in line for line in lines)
    before = contents(run_dir)
    assert repaired(run_dir)[0] == 0
    assert contents(run_dir) == before
    assert StageDir(run_dir, "sft").is_final()
    assert verified(run_dir)[0] == 0


def test_unreadable_lines_are_kept_apart(run_dir: Path) -> None:
    metrics = run_dir / "sft" / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1}\n{"st\xff\n{"step": 3}\n')
    code, lines = verified(run_dir)
    assert code == 65
    assert any("metrics.jsonl" in line and "has 1 unreadable lines, the first is 2" in line for line in lines)
    assert repaired(run_dir)[0] == 0
    assert metrics.read_text() == '{"step": 1}\n{"step": 3}\n'
    (aside,) = (run_dir / "sft" / "damaged").iterdir()
    assert aside.read_bytes() == b'{"step": 1}\n{"st\xff\n{"step": 3}\n'


def test_a_json_file_that_is_none_is_moved(run_dir: Path) -> None:
    (run_dir / "sft" / "progress.json").write_text("{")
    assert verified(run_dir)[0] == 65
    assert repaired(run_dir)[0] == 0
    assert not (run_dir / "sft" / "progress.json").exists()


def test_what_killed_processes_leave_is_no_damage(run_dir: Path) -> None:
    with (run_dir / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (run_dir / "sft" / ".unfinished-00000003-abc").mkdir()
    (run_dir / "sft" / ".writer-00000001").mkdir()
    (run_dir / "sft" / ".writer-00000002").mkdir()
    code, lines = verified(run_dir)
    assert code == 0
    told = "\n".join(line for line in lines if "note" in line)
    for what in (".unfinished-00000003-abc was left", ".writer-00000001 was left", "metrics.jsonl ends in the middle"):
        assert what in told
    assert ".writer-00000002 was left" not in told


def test_repair_waits_for_nobody_and_moves_nothing_while_a_stage_is_at_work(run_dir: Path) -> None:
    flip_a_bit(run_dir / "sft" / NEW)
    with (
        take_lease(run_dir / "reward", seconds=0.5),
        pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .* is at work on stage reward"),
    ):
        repaired(run_dir)
    assert (run_dir / "sft" / NEW).is_dir()
    assert repaired(run_dir)[0] == 0
    assert not (run_dir / "sft" / NEW).exists()


def test_a_live_writer_is_named(run_dir: Path) -> None:
    with take_lease(run_dir / "sft", seconds=30):
        code, lines = verified(run_dir)
    assert code == 0
    assert any(f"process {os.getpid()} on" in line and "is at work here" in line for line in lines)


def test_a_directory_pruned_meanwhile_is_passed_over(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = audit.read_manifest

    def pruning(directory: Path) -> dict[str, object]:
        manifest = read(directory)
        if directory.name == OLD:
            directory.rename(directory.with_name(".unfinished-pruned"))
            (directory.parent / "best").unlink()
        return manifest

    monkeypatch.setattr(audit, "read_manifest", pruning)
    code, lines = verified(run_dir)
    assert code == 0
    assert not any(OLD in line for line in lines)


def test_what_is_published_meanwhile_is_looked_at_as_well(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = audit.read_manifest

    def publishing(directory: Path) -> dict[str, object]:
        if directory.name == NEW:
            publish(run_dir, "sft", 5, "five")
        return read(directory)

    monkeypatch.setattr(audit, "read_manifest", publishing)
    code, lines = verified(run_dir)
    assert code == 0
    assert any("step-00000005" in line and " ok " in line for line in lines)


def test_no_run_is_a_missing_prerequisite(tmp_path: Path) -> None:
    for run in (verify_run, repair_run):
        with pytest.raises(PrerequisiteError, match="holds no run") as caught:
            run(tmp_path / "absent", say=print)
        assert caught.value.exit_code == 66
    assert not (tmp_path / "absent").exists()


def test_a_thousand_files_and_a_long_reading_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(audit, "PIECE_BYTES", 1000)
    with StageDir(tmp_path / "demo", "fetch").publish(0, final=True) as directory:
        for number in range(1000):
            (directory / f"file-{number}").write_text(str(number))
        (directory / "weights").write_bytes(bytes(2500))
    code, lines = verified(tmp_path / "demo")
    assert code == 0
    assert "1001 files" in lines[-1]
    assert sum(line.startswith("…") and line.endswith("weights") for line in lines) == 3


def test_a_file_that_may_not_be_read_is_not_called_damaged(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: audit.Reader, path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(audit.Reader, "sha256", refused)
    with pytest.raises(StorageError, match="permission denied; let this user read it"):
        verified(run_dir)


@pytest.mark.parametrize("times", [1, 2])
def test_what_cannot_be_read_is_read_again_before_it_is_called_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    sha256, failed = Reader.sha256, []

    def fail_at_first(self: Reader, path: Path) -> str:
        if path.name == "weights" and path.parent.parent.name == "sft" and len(failed) < times:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return sha256(self, path)

    monkeypatch.setattr(Reader, "sha256", fail_at_first)
    lines: list[str] = []
    assert verify_run(run_dir, say=lines.append) == (0 if times == 1 else 65)
    assert len(failed) == times
    assert any("weights cannot be read: input/output error" in line for line in lines) == (times == 2)
