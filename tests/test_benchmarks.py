"""The benchmarks run; what they say is for people."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import saving
from tests.benchmarks.service import measure, table


def test_the_service_benchmark_measures_every_load() -> None:
    results = measure(requests=16, callers=4, threads=1)
    loads = {name for name, load in results.items() if isinstance(load, dict) and load["requests_per_second"] > 0}
    assert loads == {
        "one at a time, 1 caller",
        "one at a time, 4 callers",
        "batched, 4 callers",
        "batched, half load",
    }
    assert len(table(results).splitlines()) == 1 + len(results)


def test_the_saving_benchmark_measures_both_ways(tmp_path: Path) -> None:
    found = saving.measure(tmp_path, megabytes=4, rounds=2)
    assert 0 < found.waits < found.in_background
    assert found.ratio == found.at_once / found.waits
