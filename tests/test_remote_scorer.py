"""Scores asked of a service: the numbers of a Scorer, and what becomes of every way in which a service fails."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoint import fingerprint
from rlhf.config import Config
from rlhf.errors import ConfigError, DataError, RlhfError, UnavailableError
from rlhf.models import load_reward_model
from rlhf.remote_scorer import RemoteScorer, ScorerAway, keep_trying, open_remote_scorer
from rlhf.scoring import Scorer
from rlhf.service_client import Patience, ServiceClient
from tests.fakes import EOS_ID, PAD_ID, POSITIONS
from tests.served_run import publish_reward_model, served_run
from tests.serving import serving_run
from tests.tiny_run import tiny_config

CHECKSUM = "c0ffee" * 10
Answer = tuple[int, dict[str, str], bytes]
SEQUENCES = [[number, 1] for number in range(10)]


class FaultyService(ThreadingHTTPServer):
    """Scores a sequence by its sum, unless `answers` says something else for one of the next requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[list[list[int]]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[Callable[[list[list[int]]], Answer | None]] = []
        self.always: Callable[[list[list[int]]], Answer | None] = scores
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that has gone before its answer is nothing to be told of."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FaultyService
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        items = [item["token_ids"] for item in body["items"]]
        with self.server.lock:
            self.server.asked.append(items)
            self.server.headers.append({"path": self.path, **dict(self.headers)})
            answer = self.server.answers.pop(0) if self.server.answers else self.server.always
        told = answer(items)
        if told is None:
            self.close_connection = True
            return
        status, headers, content = told
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = len(content) < int(headers.get("Content-Length", 0))

    def log_message(self, *_: Any) -> None:
        """Not to stderr."""


def scores(items: list[list[int]], *, checksum: str = CHECKSUM, **headers: str) -> Answer:
    results = [{"index": index, "score": float(sum(ids))} for index, ids in enumerate(items)]
    return 200, headers, json.dumps({"run": "other", "step": 7, "checksum": checksum, "results": results}).encode()


def problem(status: int, *, title: str = "No", detail: str = "for a reason", **more: Any) -> Any:
    headers = {"Retry-After": str(more.pop("after"))} if "after" in more else {}
    content = json.dumps({"status": status, "title": title, "detail": detail, **more}).encode()
    return lambda items: (status, headers, content)


@pytest.fixture
def service() -> Iterator[FaultyService]:
    with FaultyService() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, so that what is tried again is tried at once."""
    monkeypatch.setattr("rlhf.service_client.FIRST_PAUSE_SECONDS", 0.01)


def scorer(
    url: str, *, items: int = 4, timeout: float = 20.0, retry: float = 20.0, key_file: Path | None = None, **more: Any
) -> RemoteScorer:
    key = None if key_file is None else str(key_file)
    client = ServiceClient(url, api_key_file=key, timeout_seconds=timeout, connections=4)
    return RemoteScorer(client, checksum=CHECKSUM, items_per_request=items, retry_seconds=retry, **more)


def test_scores_stand_in_the_order_asked_whatever_the_order_of_answers(service: FaultyService) -> None:
    second_came = threading.Event()

    def late(items: list[list[int]]) -> Answer:
        assert second_came.wait(20)
        return scores(items)

    def early(items: list[list[int]]) -> Answer:
        second_came.set()
        return scores(items)

    service.answers, seen = [late, early], list[int]()
    found = scorer(service.url).score(SEQUENCES, on_progress=seen.append)
    assert found.dtype == torch.float32
    assert found.tolist() == [number + 1.0 for number in range(10)]
    assert sorted(len(items) for items in service.asked) == [2, 4, 4]
    assert seen == sorted(seen)
    assert seen[-1] == 10


def test_equal_sequences_are_asked_for_once_and_anew_in_the_next_call(service: FaultyService) -> None:
    remote, seen = scorer(service.url), list[int]()
    assert remote.score([[3], [4], [3], [3]], on_progress=seen.append).tolist() == [3.0, 4.0, 3.0, 3.0]
    assert (service.asked, seen) == ([[[3], [4]]], [4])
    assert remote.score([[3]]).tolist() == [3.0]
    assert service.asked[1:] == [[[3]]]


def test_nothing_to_score_asks_nobody() -> None:
    assert scorer("http://127.0.0.1:1").score([]).shape == (0,)


FAULTS: dict[str, Callable[[list[list[int]]], Answer | None]] = {
    "reset": lambda items: None,
    "half an answer": lambda items: (200, {"Content-Length": "999"}, b'{"results": ['),
    "503": problem(503, title="The service is loading", after=0),
    "503 of a proxy": lambda items: (503, {}, b"<html>no healthy upstream</html>"),
    "429": problem(429, title="The queue is full", after=0),
    "Retry-After that is none": lambda items: (429, {"Retry-After": "soon"}, b"{}"),
    "500": problem(500),
    "504": lambda items: (504, {}, b"[]"),
    "408": problem(408),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(fault: str, service: FaultyService, caplog: pytest.LogCaptureFixture) -> None:
    service.answers = [FAULTS[fault]] * 2
    assert scorer(service.url).score([[5], [6]]).tolist() == [5.0, 6.0]
    assert len(service.asked) == 3
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(service.url)
    assert warning.endswith("; trying again")


def test_a_slow_answer_is_given_up_and_asked_for_again(service: FaultyService) -> None:
    asked_again = threading.Event()

    def slow(items: list[list[int]]) -> Answer:
        asked_again.wait(20)
        return scores(items)

    def good(items: list[list[int]]) -> Answer:
        asked_again.set()
        return scores(items)

    service.answers = [slow, good]
    assert scorer(service.url, timeout=0.2).score([[5]]).tolist() == [5.0]


def test_it_comes_back_no_sooner_than_it_is_told(service: FaultyService) -> None:
    service.answers = [problem(429, after=1)]
    began = time.monotonic()
    assert scorer(service.url).score([[5]]).tolist() == [5.0]
    assert time.monotonic() - began >= 1.0


def test_a_service_that_is_away_too_long_is_told_and_what_it_had_scored_is_kept(service: FaultyService) -> None:
    service.answers = [scores, scores]
    service.always = problem(503, title="The service is stopping", detail="no new work")
    remote = scorer(service.url, retry=0.3)
    with pytest.raises(ScorerAway) as caught:
        remote.score(SEQUENCES)
    assert caught.value.exit_code == UnavailableError.exit_code
    told = re.search(r"HTTP 503, The service is stopping: no new work; (\d+) scores are known", str(caught.value))
    assert told is not None
    known = int(told[1])
    assert known in (6, 8)  # two of three requests were answered: 4 and 4, or 4 and 2
    service.always, service.asked, seen = scores, [], list[int]()
    assert remote.score(SEQUENCES, on_progress=seen.append).tolist() == [number + 1.0 for number in range(10)]
    assert sum(len(items) for items in service.asked) == 10 - known
    assert seen[-1] == 10


def test_nobody_at_home() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ScorerAway, match="Connection refused"):
        scorer(f"http://127.0.0.1:{port}", retry=0.1).score(SEQUENCES)


def test_told_to_come_back_too_late_it_does_not_wait(service: FaultyService) -> None:
    service.always = problem(503, after=3600)
    with pytest.raises(ScorerAway):
        scorer(service.url).score([[1]])
    assert len(service.asked) == 1


def test_who_is_asked_to_stop_waits_no_longer(service: FaultyService) -> None:
    service.always = problem(503, after=3000)
    stopped = threading.Event()
    service.answers = [lambda items: stopped.set() or problem(503)(items)]  # type: ignore[func-returns-value]
    with pytest.raises(ScorerAway):
        scorer(service.url, retry=3600, stopped=stopped.is_set).score([[1]])
    assert len(service.asked) == 1


def test_a_stage_waits_for_a_service_that_is_away_and_heeds_what_ends_it(service: FaultyService) -> None:
    class Interrupted(Exception):
        """As the stage has it."""

    service.always, heeded = problem(503, after=3600), list[int]()

    def heed() -> None:
        heeded.append(1)
        if len(heeded) == 2:
            service.always = scores
        if len(heeded) == 3:
            raise Interrupted

    remote = scorer(service.url)
    assert keep_trying(lambda: remote.score([[5], [6]]), heed=heed).tolist() == [5.0, 6.0]
    assert (len(service.asked), len(heeded)) == (3, 2)
    service.always = problem(503, after=3600)
    with pytest.raises(Interrupted):
        keep_trying(lambda: remote.score([[5]]), heed=heed)


def test_who_has_its_scores_waits_for_the_others(service: FaultyService, monkeypatch: pytest.MonkeyPatch) -> None:
    others_away, flags, heeded = [True, True, False], list[bool](), list[int]()

    def agreed(flag: bool) -> bool:
        flags.append(flag)
        return others_away.pop(0)

    monkeypatch.setattr("rlhf.remote_scorer.agreed", agreed)
    found = keep_trying(lambda: scorer(service.url).score([[5]]), heed=lambda: heeded.append(1))
    assert found.tolist() == [5.0]
    assert (flags, len(heeded), service.asked) == ([False] * 3, 2, [[[5]]])


def test_patience_begins_anew_with_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlhf.service_client.time.monotonic", lambda: now[0])
    patience = Patience(10, lambda: False)
    assert patience.pause(0)
    now[0] = 109.0
    assert not patience.pause(2)
    patience.answered()
    now[0] = 118.0
    assert patience.pause(0)
    now[0] = 120.0
    assert not patience.pause(0)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (problem(401, title="A valid API key is needed"), ConfigError, "401, A valid .* ppo.remote.api_key_file names"),
        (problem(403), ConfigError, "HTTP 403, No: for a reason; put a key"),
        (problem(404), ConfigError, "HTTP 404, .* address of the service, to which /score is added"),
        (problem(413), ConfigError, "HTTP 413, .* raise APP_MAX_BODY_BYTES"),
        (
            problem(422, errors=[{"field": "items.0.token_ids", "message": "too long"}]),
            DataError,
            "HTTP 422, .* serve this run",
        ),
        (lambda items: (301, {"Location": "/"}, b""), ConfigError, "HTTP 301 .* look at ppo.remote"),
        (lambda items: (418, {}, b"[]"), ConfigError, "HTTP 418"),
        (lambda items: (200, {}, b"<html>"), ConfigError, "not JSON; is it the service"),
        (lambda items: (200, {}, b"{}"), ConfigError, "does not answer as the service of this release"),
        (lambda items: scores([*items, [1]]), ConfigError, "does not answer as the service of this release"),
        (
            lambda items: scores(items, checksum="beef" * 16),
            ConfigError,
            r"reward model beefbeefbeefbeef \(run 'other'\), and this run's is c0ffeec0ffeec0ff; serve",
        ),
    ],
)
def test_what_stays_the_same_is_not_tried_again(
    fault: Any, kind: type[RlhfError], message: str, service: FaultyService
) -> None:
    service.always = fault
    with pytest.raises(kind, match=message):
        scorer(service.url).score([[1]])
    assert len(service.asked) == 1


@pytest.mark.parametrize("status", [413, 422])
def test_what_is_too_large_is_asked_in_parts_and_so_from_then_on(status: int, service: FaultyService) -> None:
    service.always = lambda items: problem(status)(items) if len(items) > 3 else scores(items)
    remote = scorer(service.url, items=10)
    assert remote.score(SEQUENCES).tolist() == [number + 1.0 for number in range(10)]
    assert [len(items) for items in service.asked] == [10, 5, 2, 3, 5, 2, 3]
    assert remote.score(SEQUENCES[:4]).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert sorted(len(items) for items in service.asked[7:]) == [2, 2]


def test_a_score_that_is_no_number(service: FaultyService) -> None:
    service.always = lambda items: (
        200,
        {},
        json.dumps({"checksum": CHECKSUM, "results": [{"score": 1.5}, {"score": None}]}).encode(),
    )
    first, second = scorer(service.url).score([[1], [2]], allow_nonfinite=True).tolist()
    assert first == 1.5
    assert math.isnan(second)
    with pytest.raises(RlhfError, match="not finite for 1 of 2 sequences"):
        scorer(service.url).score([[1], [2]])


def test_the_key_is_read_anew_and_sent(service: FaultyService, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    remote = scorer(service.url + "/", key_file=key_file)
    for key in ("first", "second"):
        key_file.write_text(f"{key}\n")
        remote.score([[1]])
    assert [headers["Authorization"] for headers in service.headers] == ["Bearer first", "Bearer second"]
    assert {headers["path"] for headers in service.headers} == {"/score"}


@pytest.mark.parametrize("content", [None, "", "two keys", "a\nb", "schlüssel"])
def test_a_key_that_cannot_be_sent(content: str | None, service: FaultyService, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=str(tmp_path / "key")):
        scorer(service.url, key_file=tmp_path / "key").score([[1]])
    assert service.asked == []


@pytest.mark.parametrize("url", ["rlhf-api:8000", "ftp://host", "http://", "http://host:port", "http://host/?a=b", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a service; write it like http://"):
        scorer(url)


def remote_config(**remote: Any) -> Config:
    return Config.model_validate(tiny_config().model_dump() | {"ppo": {"remote": remote}})


def test_without_an_address_there_is_no_scorer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs ppo\.remote\.url"):
        open_remote_scorer(remote_config(), tmp_path)


def test_the_service_itself_gives_the_scores_of_a_scorer(tmp_path: Path) -> None:
    """Tokens that a policy may have sampled, ended or not, among them all that a text never gives."""
    run_dir = served_run(tmp_path)
    reward = run_dir / "reward" / "final"
    chance = torch.Generator().manual_seed(1)
    lengths = [1, 2, POSITIONS, *torch.randint(1, POSITIONS, (60,), generator=chance).tolist()]
    sequences = [torch.randint(0, 260, (length,), generator=chance).tolist() for length in lengths]
    sequences += [[*sequences[5], EOS_ID], [PAD_ID, EOS_ID, PAD_ID]]
    expected = Scorer(load_reward_model(reward), batch_tokens=512).score(sequences)
    with serving_run(run_dir, max_items=20) as serving:
        # More than the service takes at once, which it says.
        config = remote_config(url=serving.url, items_per_request=40)
        found = open_remote_scorer(config, reward).score(sequences)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        with pytest.raises(DataError, match=r"items\.0\.token_ids: 129 tokens are more than the 128"):
            open_remote_scorer(config, reward).score([[1] * (POSITIONS + 1)])
        other = publish_reward_model(run_dir, step=8, seed=3)
        with pytest.raises(ConfigError, match=fingerprint(other)[:16]):
            open_remote_scorer(config, other).score(sequences)
