"""One writer a stage: who is alive keeps the lease, who is not loses it, and the loser can show nothing any more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rlhf import lease as lease_module
from rlhf.lease import Claim, Holder, LeaseHeld, LeaseLost, is_dead, look, parse_claim, take_lease, this_process

SOON = 0.3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "demo" / "ppo"


def left_by(folder: Path, holder: Holder, *, token: int = 4, seconds: float = SOON) -> Path:
    """The room of a process that is not this one."""
    room = folder / f".writer-{token:08d}"
    room.mkdir(parents=True)
    (room / "lease.json").write_text(json.dumps(asdict(Claim(holder, seconds, "2026-01-01T00:00:00+0000"))))
    return room


ELSEWHERE = Holder(host="node-2", pid=7, machine="another boot pid:[1]", started="5")


def test_tokens_rise_and_a_lease_given_back_is_free_at_once(folder: Path) -> None:
    for token in (1, 2, 3):
        with take_lease(folder, seconds=60) as lease:
            assert lease.token == token
            assert lease.room.name == f".writer-{token:08d}"
        assert [path.name for path in folder.iterdir()] == [f".writer-{token:08d}"]
    sight = look(folder)
    assert sight.claim is not None
    assert sight.claim.released


def test_a_second_process_is_refused_while_the_first_lives(folder: Path) -> None:
    with take_lease(folder, seconds=1) as lease:
        with pytest.raises(LeaseHeld, match=r"process \d+ on .* is at work on stage ppo of run 'demo'") as caught:
            take_lease(folder, seconds=60)
        lease.check()
    assert caught.value.exit_code == 75


def test_the_lease_of_a_process_that_died_here_is_free_at_once(folder: Path) -> None:
    code = "import sys, pathlib, os\nfrom rlhf.lease import take_lease\n"
    code += "take_lease(pathlib.Path(sys.argv[1]), seconds=3600)\nos._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    (folder / ".writer-00000001" / "half-written").mkdir()
    with take_lease(folder, seconds=3600) as lease:
        assert lease.token == 2
        assert [path.name for path in folder.iterdir()] == [".writer-00000002"]


def test_one_that_was_killed_and_is_not_buried_yet_is_dead(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"], stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    us = this_process()
    started = lease_module._started(child.pid)
    assert started
    assert not is_dead(replace(us, pid=child.pid, started=started))
    assert is_dead(replace(us, pid=child.pid, started="1"))  # the number was given to another process
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(replace(us, pid=child.pid, started=started))
    child.wait()
    child.stdout.close()
    assert not is_dead(ELSEWHERE)


def test_a_holder_elsewhere_without_a_beat_is_taken_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    room = left_by(folder, ELSEWHERE)
    (room / "step").mkdir()
    with take_lease(folder, seconds=60) as lease:
        assert lease.token == 5
        assert [path.name for path in folder.iterdir()] == [".writer-00000005"]
    assert "taking over from process 7 on node-2 (since 2026-01-01T00:00:00+0000)" in caplog.text


def test_a_beat_whatever_its_clock_says_keeps_the_lease(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = left_by(folder, ELSEWHERE, seconds=3600)
    looks = iter(range(100))

    def beat_now_and_then(seconds: float) -> None:
        if next(looks) == 3:
            os.utime(room / "lease.json", (1, 1))  # a clock of 1970

    monkeypatch.setattr("rlhf.lease.time.sleep", beat_now_and_then)
    with pytest.raises(LeaseHeld, match="process 7 on node-2"):
        take_lease(folder, seconds=60)
    assert next(looks) < 10  # at the first sign of life


def test_the_loser_is_told_and_shows_nothing(folder: Path) -> None:
    first = take_lease(folder, seconds=0.2)
    told = threading.Event()
    first.on_lost = told.set
    (first.room / "work").write_text("late")
    lease_module._fence(first.room)
    assert told.wait(30)
    with pytest.raises(LeaseLost, match="let that one go on"):
        first.check()
    first.room.mkdir()
    (first.room / "work").write_text("later")
    with pytest.raises(LeaseLost):
        first.show("work", folder / "shown")
    (folder / "published").write_text("good")
    with pytest.raises(LeaseLost):
        first.hide(folder / "published", "gone")
    first.release()
    assert sorted(path.name for path in folder.iterdir()) == [".writer-00000001", "published"]
    with take_lease(folder, seconds=60) as second:  # what it made in the meantime is nobody's
        assert second.token == 2
        assert not first.room.exists()


def test_who_looked_at_an_old_state_withdraws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with take_lease(folder, seconds=60), take_over(folder, 9):
        monkeypatch.setattr("rlhf.lease._wait_until_free", lambda path, seconds: lease_module.Sight(6, None, 0))
        with pytest.raises(LeaseHeld):
            take_lease(folder, seconds=60)
        assert sorted(path.name for path in folder.iterdir()) == [".writer-00000001", ".writer-00000009"]


def test_who_is_overtaken_before_it_has_begun_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.lease.sync", lambda path: lease_module._fence(folder / ".writer-00000001"))
    with pytest.raises(LeaseHeld):
        take_lease(folder, seconds=60)


class take_over:  # noqa: N801 - reads as a statement
    """A room of a higher token, made and removed."""

    def __init__(self, folder: Path, token: int) -> None:
        self.folder, self.token = folder, token

    def __enter__(self) -> None:
        self.room = left_by(self.folder, ELSEWHERE, token=self.token, seconds=3600)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.room)


def test_of_many_at_once_one_wins(folder: Path) -> None:
    left_by(folder, ELSEWHERE, seconds=0.1)
    won, refused = [], []

    def contend() -> None:
        try:
            won.append(take_lease(folder, seconds=60))
        except LeaseHeld as error:
            refused.append(error)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 7
    won[0].check()
    won[0].release()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"holder": 3}', "[" * 100_000, '{"holder": {"pid": 1e400}}',
     '{"holder": {"host": "a", "pid": 0, "machine": "", "started": ""}, "seconds": 1, "since": "", "released": false}',
     '{"holder": {"host": "a", "pid": 1, "machine": "", "started": ""}, "seconds": NaN, "since": "", "released": 0}'],
)  # fmt: skip
def test_what_is_no_claim(text: str) -> None:
    assert parse_claim(text) is None


def test_a_lease_that_cannot_be_read_is_waited_for(folder: Path) -> None:
    room = folder / ".writer-00000003"
    room.mkdir(parents=True)
    (room / "lease.json").write_text("garbage")
    with take_lease(folder, seconds=SOON) as lease:
        assert lease.token == 4


def test_runs_and_stages_have_leases_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / run / stage for run in ("one", "two") for stage in ("sft", "ppo")]
    with ExitStack() as held:
        leases = [held.enter_context(take_lease(folder, seconds=60)) for folder in folders]
        for lease in leases:
            lease.check()
        assert [lease.token for lease in leases] == [1, 1, 1, 1]
