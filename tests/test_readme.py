"""What the README tells a caller to type, typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config import TinyModelConfig
from rlhf.models import create_tiny_gptj
from tests.conftest import REPOSITORY
from tests.fakes import EOS_ID, PAD_ID, tiny_reward_model
from tests.served_run import publish_model
from tests.serving import Serving, serving_run
from tests.tiny_run import tiny_config

ADDRESS = "http://127.0.0.1:8000"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## The service\n")[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A tiny run that reads posts of the README's length, one token a byte."""
    run_dir = tmp_path_factory.mktemp("runs") / "demo"
    shape = TinyModelConfig(layers=2, hidden=32, heads=2, rotary_dim=8, vocab_size=260)
    policy = create_tiny_gptj(shape, positions=512, vocab_size=260, eos_id=EOS_ID, pad_id=PAD_ID, seed=1)
    config = tiny_config(prompt={"max_prompt_tokens": 400})
    for stage in ("sft", "ppo"):
        publish_model(run_dir, stage, policy, step=1, config=config)
    publish_model(run_dir, "reward", tiny_reward_model(policy), step=1, config=config)
    with serving_run(run_dir) as serving:
        yield serving


def test_curl_lines(service: Serving) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here; install Debian's package curl")
    commands = [part for block in blocks("sh") for part in block.split("\n\n") if part.startswith("curl")]
    assert len(commands) == 3
    answers = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-ec", command.replace(ADDRESS, service.url)], check=True, capture_output=True, text=True
        )
        answers.append(done.stdout)
    [summary] = json.loads(answers[0])["results"]
    assert isinstance(summary["score"], float)
    [score] = json.loads(answers[1])["results"]
    assert score["delta"] == pytest.approx(score["score"] - score["reference_score"])
    events = re.findall(r"^event: (\w+)$", answers[2], flags=re.MULTILINE)
    assert events[-2:] == ["result", "done"]
    assert "error" not in events


def test_python_client(service: Serving, tmp_path: Path) -> None:
    [client] = blocks("python")
    lines = [line for line in client.splitlines() if line.strip()]
    assert len(lines) <= 10
    program = tmp_path / "client.py"
    program.write_text(client.replace(ADDRESS, service.url), encoding="utf-8")
    done = subprocess.run([sys.executable, program], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"[+-]\d+\.\d\d  .*\n", done.stdout, flags=re.DOTALL)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(((?:docs|app|rlhf)/[^)#]+)\)", README))))
def test_what_is_linked_is_there(name: str) -> None:
    assert (REPOSITORY / name).exists()
