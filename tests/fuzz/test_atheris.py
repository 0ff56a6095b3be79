"""The coverage-guided search runs on every target; here for a moment each, by hand for as long as one likes."""

from __future__ import annotations

import importlib.util

import pytest

from tests.fuzz.atheris_fuzz import run
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed; `pip install atheris` where there is a build for this Python (3.11 to 3.13)",
)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_short_search_finds_no_crash(target: Target) -> None:
    cases, failure = run(target, seconds=1)
    assert failure == ""
    assert cases >= len(target.samples())
