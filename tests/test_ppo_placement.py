"""PPO whose rollouts are scored elsewhere: the same training, however often the scorer is away."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.checkpoint import StageDir, fingerprint
from rlhf.config import Config
from rlhf.errors import ConfigError, StopRequested
from rlhf.models import load_reward_model
from rlhf.scoring import Scorer
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from tests.tiny_run import ppo_config, ready_for_ppo


class ScoringService(ThreadingHTTPServer):
    """Scores with the run's reward model; while `away`, it hangs up on callers and counts them."""

    daemon_threads = True

    def __init__(self, reward: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scorer = Scorer(load_reward_model(reward), batch_tokens=4096)
        self.checksum = fingerprint(reward)
        self.away, self.refused = False, threading.Semaphore(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ScoringService

    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        if self.server.away:
            self.close_connection = True
            self.server.refused.release()
            return
        scores = self.server.scorer.score([item["token_ids"] for item in items]).tolist()
        results = [{"index": index, "score": score} for index, score in enumerate(scores)]
        content = json.dumps({"run": "tiny", "checksum": self.server.checksum, "results": results}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Not to stderr."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return ready_for_ppo(tmp_path)


@pytest.fixture
def service(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScoringService]:
    monkeypatch.setattr("rlhf.service_client.FIRST_PAUSE_SECONDS", 0.01)
    with ScoringService(run_dir / "reward" / "final") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(service: ScoringService) -> Config:
    placed = {"url": service.url, "retry_seconds": 0.1}
    return ppo_config(iterations=2, reward_placement="remote", remote=placed)


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(StageDir(run_dir, "ppo").final() / "model.safetensors")


def test_a_scorer_that_is_away_pauses_ppo_and_changes_nothing(
    run_dir: Path, tmp_path: Path, service: ScoringService, caplog: pytest.LogCaptureFixture
) -> None:
    ppo.run(ppo_config(iterations=2), StageDir(run_dir, "ppo"), StopSignal())
    StageDir(run_dir, "ppo").path.rename(tmp_path / "colocated")
    colocated = load_file(tmp_path / "colocated" / "final" / "model.safetensors")

    service.away, stop = True, StopSignal()
    working = threading.Thread(target=ppo.run, args=(remote(service), StageDir(run_dir, "ppo"), stop))
    working.start()
    for _ in range(20):  # more than the tries of one attempt
        assert service.refused.acquire(timeout=60)
    service.away = False
    working.join(120)
    assert not working.is_alive()
    assert "waiting for the scorer" in caplog.text
    weights = final_weights(run_dir)
    assert all(torch.equal(weights[name], colocated[name]) for name in colocated)


def test_a_stop_while_the_scorer_is_away_saves_what_there_is(run_dir: Path, service: ScoringService) -> None:
    stop = StopSignal()

    def goes_away(*arguments: Any) -> Any:
        service.away = True  # after the first iteration
        threading.Thread(target=lambda: service.refused.acquire(timeout=60) and stop.request()).start()
        return take_step(*arguments)

    take_step = ppo.optimise
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopRequested, match="the state is saved"):
        patch.setattr(ppo, "optimise", goes_away)
        ppo.run(remote(service), StageDir(run_dir, "ppo"), stop)
    saved = StageDir(run_dir, "ppo").latest()
    assert saved is not None
    assert saved[0] == 1


def test_another_runs_reward_model_is_refused(run_dir: Path, service: ScoringService) -> None:
    service.checksum = "0" * 64
    with pytest.raises(ConfigError, match=r"scores with the reward model 0{16} \(run 'tiny'\), and this run's is"):
        ppo.run(remote(service), StageDir(run_dir, "ppo"), StopSignal())


def test_a_gpu_of_its_own_has_to_be_there(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.reward_placement=dedicated .* the policy is on the CPU; use 2 GPUs"):
        ppo.run(ppo_config(reward_placement="dedicated"), StageDir(run_dir, "ppo"), StopSignal())
