"""What the documents tell a reader to type exists: our commands parse, make knows its targets, files are there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf.__main__ import build_parser
from tests.conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands() -> list[tuple[str, list[str]]]:
    """Every command of every shell block, with its document; pipes, redirections and comments left out."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(
            r"^ *```sh\n(.*?)^ *```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                found += [(document.name, words) for words in split_line(line)]
    return found


def split_line(line: str) -> list[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # part of a quotation that spans lines: a body for curl
        return []
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", ";", "|", ">", ">>"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def of_program(*program: str) -> list[tuple[str, list[str]]]:
    return [(name, words) for name, words in commands() if words[: len(program)] == list(program)]


def test_our_commands_parse() -> None:
    found = of_program("python", "-m", "rlhf")
    assert len(found) >= 8
    for document, words in found:
        if "--help" not in words:
            build_parser().parse_args(words[3:])
        assert document


@pytest.mark.parametrize(
    ("document", "words"), of_program("make"), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_make_knows_its_targets(document: str, words: list[str]) -> None:
    tried = subprocess.run(["make", "-n", *words[1:]], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert tried.returncode == 0, f"{document}: {tried.stderr}"


def test_applied_files_are_there() -> None:
    found = of_program("kubectl", "apply")
    assert len(found) >= 3
    for _, words in found:
        path = REPOSITORY / words[words.index("-k" if "-k" in words else "-f") + 1]
        assert (path / "kustomization.yaml").is_file() if "-k" in words else path.is_file(), path


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: https://kubernetes.io/docs/tasks/tools/"
)
def test_a_label_chooses_a_stage() -> None:
    for _, words in of_program("kubectl", "apply"):
        if "-l" in words:
            label = words[words.index("-l") + 1]
            key, _, value = label.partition("=")
            rendered = subprocess.run(
                ["kubectl", "kustomize", str(REPOSITORY / words[words.index("-k") + 1])],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            assert re.search(rf"^    {re.escape(key)}: {re.escape(value)}$", rendered, re.MULTILINE)


def test_linked_files_are_there() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    assert Path(REPOSITORY / "docs" / "kubernetes.md") in DOCUMENTS


def test_every_line_of_operations_is_shown_by_a_test_that_exists() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text.partition("## What happens when")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("**"):
            continue
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", cells[3])
        assert named, line
        for path, name in named:
            assert f"def {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{name}"
    assert len(lines) > 30
