"""How far the same training is from itself on 1, 2 and 4 processes, under each strategy, and when it changes them.

    python -m tests.benchmarks.strategies

Prints the tables of docs/many-processes.md. A tiny model on the CPU, in float32: what is left are sums in another
order. Of gradients, each number is the largest over the steps of the norm of the difference over the norm of the
gradient; of final weights, the largest difference.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tests.sharing import Order, Place, difference, run, run_here

STAGES = ("sft", "reward", "ppo")
SHARED = [(2, None), (4, None), (2, "zero2"), (4, "zero2"), (2, "zero3"), (4, "zero3")]
SHARED += [(2, "zero2-offload"), (2, "zero3-offload")]
CHANGES = [((1, None), (2, None)), ((1, None), (2, "zero2")), ((1, None), (2, "zero3")), ((2, "zero2"), (1, None))]
CHANGES += [((2, "zero3"), (1, None)), ((2, "zero2"), (4, "zero3")), ((4, "zero3"), (2, "zero3-offload"))]
STOPPED_AFTER = 3

Way = tuple[int, str | None]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.strategies")
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        place.run_alone()
        print_table(("processes", "strategy"), ((named(way), shared(place, way)) for way in SHARED))
        print()
        print_table(
            ("begun on", "gone on with"),
            (
                ((" ".join(named(before)), " ".join(named(after))), changed(place, before, after))
                for before, after in CHANGES
            ),
        )


def shared(place: Place, way: Way) -> list[str]:
    """Each stage from its beginning to its end."""
    orders = [place.order(stage, way[1], name=f"shared-{way[0]}-{way[1]}") for stage in STAGES]
    run_all(orders, way[0])
    return cells(place, orders)


def changed(place: Place, before: Way, after: Way) -> list[str]:
    """Each stage stopped after its third optimiser step and gone on with otherwise."""
    name = f"changed-{before[0]}-{before[1]}-{after[0]}-{after[1]}"
    run_all([place.order(s, before[1], name=name, stop_after=STOPPED_AFTER) for s in STAGES], before[0])
    orders = [place.order(stage, after[1], name=name) for stage in STAGES]
    run_all(orders, after[0])
    return cells(place, orders)


def run_all(orders: Sequence[Order], processes: int) -> None:
    """Here, or on so many processes of their own."""
    if processes > 1:
        run(orders, processes=processes)
        return
    for order in orders:
        run_here(order)


def cells(place: Place, orders: Iterable[Order]) -> list[str]:
    """A stage's gradients and weights, compared with one process from beginning to end."""
    found = [difference(order, place.alone(order)) for order in orders]
    return [f"{one.gradients:.0e} · {one.weights:.0e}" for one in found]


def named(way: Way) -> tuple[str, str]:
    """As the table says it."""
    return str(way[0]), way[1] or ("DDP" if way[0] > 1 else "alone")


def print_table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> None:
    """As Markdown, row by row as they come."""
    print(f"| {' | '.join([*heads, *STAGES])} |\n|{' --- |' * (len(heads) + len(STAGES))}")
    for names, values in rows:
        print(f"| {' | '.join([*names, *values])} |", flush=True)


if __name__ == "__main__":
    main()
