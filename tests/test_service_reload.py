"""A new checkpoint while callers are being served: asked for by an admin, and noticed by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.keys import new_key
from rlhf.prompt import Post
from tests.alone import Alone
from tests.live_service import LiveService, live_service, problem_in, streamed, summarize, summary_in, until
from tests.served_run import STEPS, publish_policy, served_run
from tests.tiny_run import THINGS

BODIES = tuple(f"I lost my {thing} today" for thing in THINGS)
OLD, NEW = STEPS["ppo"], STEPS["ppo"] + 1


@dataclass
class Answers:
    """What callers got so far: which step wrote which summary of which post."""

    written: list[tuple[int, str, str]] = field(default_factory=list)

    def count(self, step: int) -> int:
        return sum(wrote == step for wrote, _, _ in list(self.written))

    def more(self, step: int, count: int) -> Callable[[], bool]:
        """Whether that step has written so many more than it has now."""
        goal = self.count(step) + count
        return lambda: self.count(step) >= goal


def ask_again_and_again(service: LiveService, answers: Answers, stop: threading.Event) -> None:
    while not stop.is_set():
        for body in BODIES:
            answer = summarize(service, body)
            summary = summary_in(answer)
            answers.written.append((answer.json()["step"], body, summary))


def stream_again_and_again(service: LiveService, answers: Answers, stop: threading.Event) -> None:
    while not stop.is_set():
        for body in BODIES:
            *_, (_, result), (_, done) = streamed(service, body)
            answers.written.append((done["step"], body, result["summary"]))


@contextmanager
def under_load(service: LiveService) -> Iterator[Answers]:
    """Six callers who ask without a pause; whatever any of them does not get fails the test."""
    answers, stop = Answers(), threading.Event()
    with ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(ask_again_and_again, service, answers, stop) for _ in range(4)]
        callers += [pool.submit(stream_again_and_again, service, answers, stop) for _ in range(2)]
        try:
            until(answers.more(OLD, 10))
            yield answers
        finally:
            stop.set()
        for caller in callers:
            caller.result()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return served_run(tmp_path)


def right_answers(run_dir: Path, step: int) -> set[tuple[int, str, str]]:
    """What the policy that is final now, at this step, must write for each post."""
    alone = Alone(run_dir)
    return {(step, body, alone.write(Post("", "", body)).summary) for body in BODIES}


def test_a_reload_under_load_loses_nothing(run_dir: Path, tmp_path: Path) -> None:
    admin, line = new_key("admin")
    (tmp_path / "admins").write_text(f"{line}\n")

    def reload() -> httpx.Response:
        return service.client.post("/admin/reload", headers={"Authorization": f"Bearer {admin}"})

    settings: dict[str, Any] = {"admin_keys_file": tmp_path / "admins", "slots": 4, "max_best_of": 4}
    right = right_answers(run_dir, OLD)
    with live_service(run_dir, tmp_path / "log", hooks=tmp_path, **settings) as service:
        with under_load(service) as answers:
            publish_policy(run_dir, "ppo", step=NEW, seed=9)
            right |= right_answers(run_dir, NEW)
            assert problem_in(service.client.post("/admin/reload")) == (401, "/problems/unauthorized")
            changed = reload()
            assert (changed.status_code, changed.json()["changed"]) == (200, True)
            assert [model["step"] for model in changed.json()["models"]] == [NEW, STEPS["sft"], STEPS["reward"]]
            until(answers.more(NEW, 10))

            damaged = publish_policy(run_dir, "ppo", step=NEW + 1, seed=11) / "model.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
            kept = reload()
            assert problem_in(kept) == (409, "/problems/reload-failed")
            assert "sha256 differs" in kept.json()["detail"]
            until(answers.more(NEW, 10))
            assert service.client.get("/readyz").status_code == 200
        assert set(answers.written) <= right
        assert service.metric("rlhf_model_info", model="ppo", step=str(NEW)) == 1
        assert service.metric("rlhf_model_info", model="ppo") == 1
        until(lambda: service.report()["runs"] == 1)
        assert service.in_progress() == (0, 0)
        assert len(service.complaints()) == 1  # of the damaged one


def test_a_changed_final_is_followed_under_load(run_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"watch": True, "watch_seconds": 0.1, "slots": 4, "max_best_of": 4}
    right = right_answers(run_dir, OLD)
    with live_service(run_dir, tmp_path / "log", hooks=tmp_path, **settings) as service:
        with under_load(service) as answers:
            publish_policy(run_dir, "ppo", step=NEW, seed=9)
            right |= right_answers(run_dir, NEW)
            until(answers.more(NEW, 10))
        assert set(answers.written) <= right
        until(lambda: service.report()["runs"] == 1)
        assert service.complaints() == []
        assert service.stop() == 0
