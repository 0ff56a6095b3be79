"""What a user can get wrong, through the real command: one clear line, the right exit code, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.checkpoint import StageDir
from rlhf.data import write_jsonl
from tests.conftest import REPOSITORY
from tests.tiny_run import fetched_run, tiny_config


def fails(code: int, *arguments: str) -> str:
    """Run the command, which must end with this code; the last line it left on stderr."""
    answer = subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if not key.startswith("RLHF_")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == code, answer.stderr
    assert "Traceback" not in answer.stderr
    facts = [line for line in answer.stderr.splitlines() if not line.startswith("{")]
    assert len(facts) == 1, answer.stderr
    return facts[0]


def fetch(runs_dir: Path, *settings: str, code: int) -> str:
    changes = [word for setting in settings for word in ("--set", setting)]
    return fails(code, "fetch", "--config", "demo", "--run", "r", "--runs-dir", str(runs_dir), *changes)


def write_posts(path: Path, count: int) -> Path:
    rows = [
        {"prompt": f"SUBREDDIT: r/pets\nTITLE: cat {i}\nPOST: I lost cat {i}.\nTL;DR:", "label": f"lost cat {i}"}
        for i in range(count)
    ]
    write_jsonl(path, rows)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A run that is fetched, and its settings in a file."""
    run_dir = fetched_run(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny_config().to_yaml())
    return run_dir, tmp_path / "tiny.yaml"


def stage(tiny: tuple[Path, Path], name: str, *settings: str, code: int) -> str:
    run_dir, config = tiny
    changes = [word for setting in settings for word in ("--set", setting)]
    return fails(
        code, name, "--config", str(config), "--run", run_dir.name, "--runs-dir", str(run_dir.parent), *changes
    )


def test_a_missing_file(tmp_path: Path) -> None:
    line = fetch(tmp_path, f"data.posts={tmp_path / 'posts.jsonl'}", code=65)
    assert line == f"rlhf: data.posts={tmp_path / 'posts.jsonl'}: no such file; check the path"


def test_broken_rows_name_file_and_line(tmp_path: Path) -> None:
    path = write_posts(tmp_path / "posts.jsonl", 20)
    lines = path.read_text().splitlines()
    lines[2] = '{"prompt": "SUBREDDIT: r/pets'
    path.write_text("\n".join(lines))
    line = fetch(tmp_path, f"data.posts={path}", code=65)
    assert f"{path}:3: invalid JSON" in line
    assert "data.max_bad_fraction" in line


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "posts.jsonl").write_text("")
    line = fetch(tmp_path, f"data.posts={tmp_path / 'posts.jsonl'}", code=65)
    assert str(tmp_path / "posts.jsonl") in line


def test_prompts_that_cannot_fit(tmp_path: Path) -> None:
    path = write_posts(tmp_path / "posts.jsonl", 200)
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    for row in rows:
        row["prompt"] = row["prompt"].replace("cat", "a very long title about one cat " * 8, 1)
    write_jsonl(path, rows)
    line = fetch(tmp_path, f"data.posts={path}", "prompt.max_prompt_tokens=16", code=65)
    assert "prompt.max_prompt_tokens" in line or "header leaves no room" in line


def test_an_unknown_key_and_a_wrong_type(tmp_path: Path) -> None:
    assert "unknown key ppo.gama; did you mean ppo.gamma?" in fetch(tmp_path, "ppo.gama=1", code=78)
    assert "ppo.iterations='many'" in fetch(tmp_path, "ppo.iterations=many", code=78)


def test_a_missing_stage_names_its_command(tiny: tuple[Path, Path]) -> None:
    line = stage(tiny, "reward", code=66)
    assert line.endswith("sft/final does not exist; run `python -m rlhf sft --run tiny` first")


def test_a_model_without_the_needed_head(tiny: tuple[Path, Path]) -> None:
    """A language model where the reward model should be: transformers alone would make up a head."""
    run_dir, _ = tiny
    base = StageDir(run_dir, "fetch").final() / "base"
    for name in ("sft", "reward"):
        with StageDir(run_dir, name).publish(1, final=True) as directory:
            shutil.copytree(base, directory, dirs_exist_ok=True)
    line = stage(tiny, "prepare", code=66)
    assert "is not a reward model: weights are missing: score.weight" in line


def test_damage_is_named(tiny: tuple[Path, Path]) -> None:
    run_dir, _ = tiny
    (StageDir(run_dir, "fetch").final() / "data" / "posts-train.jsonl").write_text("{}")
    line = stage(tiny, "sft", code=66)
    assert "posts-train.jsonl has 2 bytes instead of" in line
    assert "run `python -m rlhf fetch --run tiny` first" in line


def test_a_full_disk(tiny: tuple[Path, Path], small_volume: Callable[[str], Path]) -> None:
    """The volume fills while SFT saves; what was there before stays good."""
    run_dir, config = tiny
    volume = small_volume("640k")
    shutil.copytree(run_dir, volume / "tiny", symlinks=True)
    line = stage((volume / "tiny", config), "sft", "sft.max_steps=2", "sft.save_every_steps=1", code=74)
    assert "the volume is full: free space or enlarge it; what was saved before is still good" in line
    StageDir(volume / "tiny", "fetch").final()
    assert not StageDir(volume / "tiny", "sft").is_final()
