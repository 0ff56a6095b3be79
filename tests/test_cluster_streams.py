"""Logs are read once and whole through cut streams, whatever the server sends again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from rlhf.cluster import streams
from rlhf.cluster.api import ApiRefusal, Query
from rlhf.cluster.documents import Document
from rlhf.cluster.streams import LogFollower, Position, has_begun, has_ended, split_stamp, whole_lines
from rlhf.errors import UnavailableError
from tests.cluster_objects import RUNNING, ended, pod, waiting


@pytest.mark.parametrize(
    ("line", "stamp", "text"),
    [
        ("2026-01-02T12:00:00.000000001Z a b", (1767355200, 1), "a b"),
        ("2026-01-02T12:00:00.5Z x", (1767355200, 500_000_000), "x"),
        ("2026-01-02T12:00:00Z x", (1767355200, 0), "x"),
        ("2026-01-02T14:00:00.25+02:00 x", (1767355200, 250_000_000), "x"),
        ("2026-01-02T10:00:00.25-02:00 x", (1767355200, 250_000_000), "x"),
        ("2026-01-02T12:00:00.000000001Z ", (1767355200, 1), ""),
        ("no time at all", None, "no time at all"),
    ],
)
def test_the_time_before_a_line(line: str, stamp: tuple[int, int] | None, text: str) -> None:
    assert split_stamp(line) == (stamp, text)


def at(nanoseconds: int, text: str, second: int = 0) -> str:
    return f"2026-01-02T12:00:{second:02}.{nanoseconds:09}Z {text}"


def test_what_comes_again_after_a_cut_is_passed_over() -> None:
    position = Position()
    first = [at(1, "a"), at(5, "b"), at(5, "c")]
    assert list(position.fresh(first)) == ["a", "b", "c"]
    assert position.since() == "2026-01-02T12:00:00Z"
    again = [*first, at(5, "d"), at(6, "e")]
    assert list(position.fresh(again)) == ["d", "e"]
    assert list(position.fresh([*again, at(0, "f", second=1)])) == ["f"]
    assert list(position.fresh([at(0, "f", second=1)])) == []


def test_two_pipes_may_write_a_little_out_of_order() -> None:
    assert list(Position().fresh([at(5, "out"), at(4, "err"), at(5, "out")])) == ["out", "err", "out"]


def test_half_a_line_is_kept_back_until_it_comes_whole() -> None:
    pieces = [b"one\ntw", b"o\n\nthr"]
    assert list(whole_lines(pieces, ended=False)) == ["one", "two", ""]
    assert list(whole_lines(pieces, ended=True)) == ["one", "two", "", "thr"]
    letters = [bytes([byte]) for byte in "ü\n".encode()]
    assert list(whole_lines(letters, ended=False)) == ["ü"]


def test_when_a_container_has_a_log_and_when_it_is_complete() -> None:
    both = pod(states={"check": ended(0), "stage": RUNNING})
    assert [has_begun(both, name) for name in ("check", "stage")] == [True, True]
    assert [has_ended(both, name) for name in ("check", "stage")] == [True, False]
    assert not has_begun(pod(), "check")
    assert not has_begun(pod(states={"stage": waiting("PodInitializing")}), "stage")
    service = pod(phase="Running", states={"stage": {**waiting("CrashLoopBackOff"), "lastState": ended(1)}})
    service["spec"]["restartPolicy"] = "Always"
    assert has_begun(service, "stage")
    again = pod(phase="Running", states={"stage": ended(1), "check": ended(1)})
    again["spec"]["restartPolicy"] = "Always"
    assert [has_ended(again, name) for name in ("check", "stage")] == [False, False]


class Server:
    """Streams that a test has written down: each is bytes, then an end or an error."""

    def __init__(self, *streams: tuple[bytes, Exception | None]) -> None:
        self.streams, self.queries = list(streams), list[Query]()
        self.opened = threading.Semaphore(0)

    def passes(self, error: UnavailableError) -> bool:
        return "settling" in str(error)

    def log(self, name: str, query: Query, *, read_seconds: float) -> Iterator[bytes]:
        self.queries.append(query)
        self.opened.release()
        content, error = self.streams.pop(0)
        yield content
        if error is not None:
            raise error


def following(server: Server, act: Callable[[LogFollower], None], monkeypatch, tail: int | None = None) -> list[str]:
    monkeypatch.setattr(streams, "PAUSE_SECONDS", 0.01)
    printed: list[str] = []
    follower = LogFollower(server, lambda who, line: printed.append(f"{who}>{line}"), printed.append, tail=tail)
    act(follower)
    follower.finish(10)
    return printed


def stage_pod(state: Document, phase: str = "Running") -> Document:
    made = pod(phase=phase, states={"stage": state})
    made["spec"]["initContainers"] = []
    return made


def test_a_broken_stream_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(
        (f"{at(1, 'a')}\n{at(2, 'hal')}".encode(), UnavailableError("connection reset")),
        (b"", ApiRefusal("the kubelet is away", 502, {})),
        (f"{at(1, 'a')}\n{at(2, 'half a line')}\n{at(3, 'last, cut off')}".encode(), None),
        (f"{at(1, 'a')}\n{at(2, 'half a line')}\n{at(3, 'last, cut off by the end')}".encode(), None),
    )

    def act(follower: LogFollower) -> None:
        follower.show([stage_pod(RUNNING)], named=True)
        for _ in range(3):
            assert server.opened.acquire(timeout=10)
        follower.show([stage_pod(ended(0), "Succeeded")], named=True)

    printed = following(server, act, monkeypatch)
    assert printed == ["rlhf-ppo-0>a", "rlhf-ppo-0>half a line", "rlhf-ppo-0>last, cut off by the end"]
    assert [dict(query).get("sinceTime") for query in server.queries] == [None, *["2026-01-02T12:00:00Z"] * 3]


def test_a_pod_that_is_gone_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server((f"{at(1, 'a')}\n".encode(), None))

    def act(follower: LogFollower) -> None:
        follower.show([stage_pod(RUNNING)], named=False)
        assert server.opened.acquire(timeout=10)
        follower.show([], named=False)

    assert following(server, act, monkeypatch) == [">a"]


def test_a_pod_that_failed_before_its_container_began_has_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = stage_pod(waiting("PodInitializing"), "Failed")
    assert following(Server(), lambda follower: follower.show([failed], named=False), monkeypatch) == []


def test_a_log_that_may_not_be_read_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settling, no = ApiRefusal("settling", 403, {}), ApiRefusal("you may not", 403, {})
    server = Server((b"", settling), (b"", no))
    done = stage_pod(ended(0), "Succeeded")
    printed = following(server, lambda follower: follower.show([done], named=False), monkeypatch)
    assert printed == ["no log of rlhf-ppo-0: you may not"]


def test_the_tail_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server((f"{at(1, 'a')}\n".encode(), UnavailableError("reset")), (b"", None))
    done = stage_pod(ended(0), "Succeeded")
    following(server, lambda follower: follower.show([done], named=False), monkeypatch, tail=5)
    asked = [dict(query) for query in server.queries]
    assert [("tailLines" in each, "sinceTime" in each) for each in asked] == [(True, False), (False, True)]
