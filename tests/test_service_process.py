"""The life of the service's process: start, stop, overload, a model that dies, settings that are wrong."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.prompt import Post
from tests.alone import Alone
from tests.conftest import REPOSITORY
from tests.live_service import (
    PATIENCE_SECONDS,
    LiveService,
    live_service,
    problem_in,
    service_environment,
    streamed,
    summarize,
    summary_in,
    until,
)
from tests.served_run import served_run
from tests.tiny_run import THINGS

BODIES = tuple(f"I lost my {thing} {when}" for thing in THINGS for when in ("today", "on the way home"))
QUEUE_TOKENS = 1300
"""One token a byte, and 24 for the summary: all of BODIES but the first make 1264, and another one does not fit."""
PROBES = ("/livez", "/startupz", "/readyz")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def summaries(run_dir: Path) -> dict[str, str]:
    """What the served policy must write."""
    alone = Alone(run_dir)
    return {body: alone.write(Post("", "", body)).summary for body in BODIES}


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def probes(service: LiveService) -> list[tuple[int, str]]:
    answers = [service.client.get(probe) for probe in PROBES]
    return [(answer.status_code, answer.json()["status"]) for answer in answers]


def test_probes_tell_how_far_the_start_is_and_that_a_model_has_died(
    run_dir: Path, tmp_path: Path, callers: ThreadPoolExecutor
) -> None:
    def phase(probe: str) -> str:
        return str(service.client.get(probe).json()["phase"])

    (tmp_path / "loading").write_text("loading ppo")
    with live_service(run_dir, tmp_path / "log", hooks=tmp_path, ready=False, slots=2, max_best_of=1) as service:
        until(lambda: phase("/startupz") == "loading ppo")
        assert probes(service) == [(200, "ok"), (503, "starting"), (503, "starting")]
        early = summarize(service, BODIES[0])
        assert problem_in(early) == (503, "/problems/not-ready")
        assert early.json()["detail"].endswith("loading ppo")
        assert int(early.headers["retry-after"]) >= 1
        (tmp_path / "loading").write_text("warming up reward")
        until(lambda: phase("/startupz") == "warming up reward")
        (tmp_path / "loading").unlink()
        until(lambda: service.client.get("/readyz").status_code == 200)
        assert probes(service) == [(200, "ok")] * 3

        (tmp_path / "hold").touch()
        plain = [callers.submit(summarize, service, body) for body in BODIES[:3]]
        stream = callers.submit(streamed, service, BODIES[3])
        until(lambda: sum(service.in_progress()) == 4)
        (tmp_path / "die").touch()
        (tmp_path / "hold").unlink()
        assert {problem_in(answer.result()) for answer in plain} == {(503, "/problems/engine-dead")}
        name, problem = stream.result()[-1]
        assert (name, problem["status"], problem["type"]) == ("error", 503, "/problems/engine-dead")
        assert probes(service) == [(503, "failed"), (200, "ok"), (503, "failed")]
        assert "generate-ppo has died" in phase("/livez")
        assert problem_in(summarize(service, BODIES[0])) == (503, "/problems/engine-dead")
        assert service.in_progress() == (0, 0)
        assert service.complaints() == ["generate-ppo has died"]
        assert service.stop() == 0


def test_a_full_queue_refuses_and_sigterm_under_load_loses_nothing(
    run_dir: Path, tmp_path: Path, callers: ThreadPoolExecutor, summaries: dict[str, str]
) -> None:
    """More callers than slots: those that wait in the queue were accepted too."""
    hold = tmp_path / "hold"
    limits: dict[str, Any] = {"slots": 1, "max_best_of": 1, "queue_tokens": QUEUE_TOKENS}
    with live_service(run_dir, tmp_path / "log", hooks=tmp_path, **limits) as service:
        hold.touch()
        plain = {BODIES[0]: callers.submit(summarize, service, BODIES[0])}
        until(lambda: service.in_progress() == (1, 0))
        plain |= {body: callers.submit(summarize, service, body) for body in BODIES[1:10]}
        streams = {body: callers.submit(streamed, service, body) for body in BODIES[10:]}
        until(lambda: service.in_progress() == (1, len(BODIES) - 1))
        refused = summarize(service, BODIES[0])
        assert problem_in(refused) == (429, "/problems/queue-full")
        assert int(refused.headers["retry-after"]) >= 1

        service.process.send_signal(signal.SIGTERM)
        until(lambda: probes(service) == [(200, "ok"), (200, "ok"), (503, "draining")])
        for _ in range(100):  # connections that are new are taken as long as work is left
            assert service.client.get("/readyz", headers={"Connection": "close"}).status_code == 503
        late = summarize(service, BODIES[0])
        assert problem_in(late) == (503, "/problems/draining")
        assert (late.headers["connection"], late.headers["retry-after"]) == ("close", "1")
        hold.unlink()
        for body, answer in plain.items():
            assert summary_in(answer.result()) == summaries[body]
        for body, events in streams.items():
            assert [name for name, _ in events.result()][-2:] == ["result", "done"]
            assert events.result()[-2][1]["summary"] == summaries[body]
        assert service.process.wait(PATIENCE_SECONDS) == 0
        assert service.complaints() == []


def test_a_short_drain_tells_what_was_lost(run_dir: Path, tmp_path: Path, callers: ThreadPoolExecutor) -> None:
    """The thread that hangs in a step does not keep the process."""
    with live_service(run_dir, tmp_path / "log", hooks=tmp_path, drain_seconds=0.3) as service:
        (tmp_path / "hold").touch()
        lost = callers.submit(summarize, service, BODIES[0])
        broken = callers.submit(streamed, service, BODIES[1])
        until(lambda: sum(service.in_progress()) == 2)
        assert service.stop() == 0
        assert problem_in(lost.result()) == (503, "/problems/draining")
        with pytest.raises(httpx.RemoteProtocolError):
            broken.result()
        assert "APP_DRAIN_SECONDS=0.3 were not enough; requests lost: 2" in service.complaints()


def serve(run_dir: Path, **settings: object) -> tuple[int, str]:
    """The exit code of a service that cannot start, and what is on stderr beside the log."""
    ended = subprocess.run(
        [sys.executable, "-m", "app"],
        cwd=REPOSITORY,
        env=service_environment({"run_dir": run_dir, "port": 0, "threads": 1, **settings}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return ended.returncode, "".join(
        line for line in ended.stderr.splitlines(keepends=True) if not line.startswith("{")
    )


def test_a_wrong_setting_is_one_line(run_dir: Path) -> None:
    assert serve(run_dir, slotz=4) == (78, "app: unknown variable APP_SLOTZ; did you mean APP_SLOTS?\n")


def test_a_run_without_models_is_one_line(tmp_path: Path) -> None:
    code, message = serve(tmp_path)
    assert (code, message.count("\n")) == (66, 1)
    assert message.startswith(f"app: {tmp_path}/ppo/final does not exist; run `python -m rlhf ppo ")


def test_a_run_whose_manifest_does_not_verify_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run_dir, tmp_path / "damaged", symlinks=True)
    weights = (damaged / "reward" / "final" / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    code, message = serve(damaged)
    assert (code, message.count("\n")) == (66, 1)
    assert message.startswith(f"app: {weights} has changed since it was written (sha256 differs); move ")
