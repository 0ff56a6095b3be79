"""Nodes hear of one another's failures."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rlhf.launcher.outcome import Outcome
from rlhf.launcher.peers import Peers

BROKEN = Outcome(65, "row 7 is broken", 12.0)


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    """Three nodes; node 0 is linked with both others."""
    first, second = socket.socketpair(), socket.socketpair()
    nodes = [Peers({1: first[0], 2: second[0]}), Peers({0: first[1]}), Peers({0: second[1]})]
    yield nodes
    for node in nodes:
        node.close()


def test_all_hear_of_a_failure_once(three: list[Peers]) -> None:
    assert [node.failures() for node in three] == [[], [], []]
    three[1].tell(BROKEN)
    heard = Outcome(65, "node 1: row 7 is broken", 12.0)
    assert three[0].failures() == [heard]
    assert three[2].failures() == [heard]
    three[1].close()
    assert [node.failures() for node in three] == [[], [], []]


def test_node_0s_own_failure_is_heard(three: list[Peers]) -> None:
    three[0].tell(BROKEN)
    assert three[1].failures() == three[2].failures() == [Outcome(65, "node 0: row 7 is broken", 12.0)]


def test_who_leaves_when_done_is_not_missed(three: list[Peers]) -> None:
    three[2].tell(Outcome(0, "", 1.0))
    assert three[0].failures() == []
    three[2].close()
    assert three[0].failures() == []
    assert sorted(three[0].links) == [1]
    assert three[1].failures() == []


def test_who_is_gone_without_a_word_is_missed_by_all(three: list[Peers]) -> None:
    three[1].close()
    [missed] = three[0].failures()
    assert (missed.code, missed.line) == (1, "node 1 is gone without a word; see what became of its pod")
    assert three[2].failures() == [missed]


def test_telling_one_that_has_left_is_no_error(three: list[Peers]) -> None:
    three[1].close()
    three[0].tell(BROKEN)
    assert three[2].failures() == [Outcome(65, "node 0: row 7 is broken", 12.0)]
