"""Log lines on a terminal and elsewhere."""

from __future__ import annotations

import io
import json

import pytest

from rlhf.cluster.lines import Progress, parse_line, parse_progress
from rlhf.cluster.screen import CLEAR_LINE, Screen
from rlhf.status import duration


def fact(message: str, **more: object) -> str:
    return json.dumps(
        {"time": "2026-01-02T03:04:05+0000", "level": "INFO", "logger": "rlhf.x", "message": message, **more}
    )


STEP = fact("progress stage=ppo done=3 total=16 unit=iterations seconds_left=120.4 reward=0.41 kl=1.2")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_read_from_its_line() -> None:
    shown = (("reward", "0.41"), ("kl", "1.2"))
    assert parse_progress(STEP) == Progress("ppo", 3, 16, "iterations", 120.4, shown)
    assert str(parse_progress(STEP)) == "ppo: 3 of 16 iterations, about 2 min 0 s left, reward 0.41, kl 1.2"
    assert str(parse_progress(STEP.replace("done=3", "done=16"))) == "ppo: 16 of 16 iterations, reward 0.41, kl 1.2"
    begun = parse_progress(fact("progress stage=sft done=0 total=16 unit=steps"))
    assert begun == Progress("sft", 0, 16, "steps", None, ())
    assert str(begun) == "sft: 0 of 16 steps"


@pytest.mark.parametrize(
    "line",
    ["progress stage=ppo done=3 total=16", fact("progressive"), fact("progress stage=ppo"), "{", "[1]", "{}", ""],
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert parse_progress(line) is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (fact("saved step=400"), "03:04:05 I saved step=400"),
        (fact("GET /livez", request_id="ab"), "03:04:05 I GET /livez request_id=ab"),
        (fact("oh", level="ERROR", traceback="Trace\n  why"), "03:04:05 E oh\nTrace\n  why"),
    ],
)
def test_a_fact_as_people_read_it(line: str, shown: str) -> None:
    assert str(parse_line(line)) == shown


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "5 s"), (125, "2 min 5 s"), (7500, "2 h 5 min"), (0, "0 s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_pipe_gets_lines_as_they_are() -> None:
    logs, words = io.StringIO(), io.StringIO()
    screen = Screen(logs, words)
    screen.log("", STEP)
    screen.log("rlhf-ppo-1", fact("saved"))
    screen.say("it runs")
    screen.close()
    assert logs.getvalue() == f"{STEP}\nrlhf-ppo-1 | {fact('saved')}\n"
    assert words.getvalue() == "it runs\n"


def test_progress_is_cut_to_the_terminals_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "21")
    terminal = Terminal()
    Screen(terminal, terminal).log("", STEP)
    assert terminal.getvalue() == "ppo: 3 of 16 iterati"


def test_a_terminal_gets_words_above_one_line_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    screen = Screen(terminal, terminal)
    screen.log("rlhf-ppo-0", fact("oh", traceback="Trace\n  why"))
    screen.log("", STEP)
    screen.log("", "no log of ours")
    screen.say("it runs")
    screen.close()
    below = "ppo: 3 of 16 iterations, about 2 min 0 s left, reward 0.41, kl 1.2"
    assert terminal.getvalue() == (
        "rlhf-ppo-0 | 03:04:05 I oh\nrlhf-ppo-0 | Trace\nrlhf-ppo-0 |   why\n"
        f"{below}{CLEAR_LINE}no log of ours\n{below}{CLEAR_LINE}it runs\n{below}\n"
    )
