"""Every reader of what comes from outside, against arbitrary and spoiled inputs: only our own errors come out.

The cases are the same at every run. `python -m tests.fuzz.atheris_fuzz` searches on, guided by coverage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import spoiled_bytes, spoiled_values
from tests.fuzz.targets import TARGETS, Target, in_memory

MILLISECONDS = 400
"""How long a target's arbitrary, or its spoiled, inputs may take, about."""
MOST_CASES = 300


def bounded(target: Target) -> settings:
    """No deadline, no database, the same cases every time."""
    return settings(
        max_examples=min(MOST_CASES, int(MILLISECONDS / target.cost)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory()) as name:
        yield Path(name)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_samples_are_read(target: Target, folder: Path) -> None:
    for sample in target.samples():
        target.attempt(sample, folder)
    target.read(target.samples()[0], folder)  # the first one is in order


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_anything(target: Target, folder: Path) -> None:
    anything = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))

    @bounded(target)
    @given(anything)
    def check(data: bytes) -> None:
        target.attempt(data, folder)

    check()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_almost_right(target: Target, folder: Path) -> None:
    spoiled = [spoiled_bytes(sample) for sample in target.samples()]
    codec = target.codec
    if codec is not None:
        spoiled += [spoiled_values(target.samples()[0], codec)] * 2 * len(spoiled)

    @bounded(target)
    @given(st.one_of(spoiled))
    def check(data: bytes) -> None:
        target.attempt(data, folder)

    check()
