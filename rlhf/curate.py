"""Records made into clean splits: dealt by split, without duplicates, leaks and excess.

Every step counts what it drops, by split and reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from rlhf.config import DataConfig
from rlhf.data import COMPARISON_SPLITS, POST_SPLITS, Comparison, Example
from rlhf.intake import Intake, Placed

_Record = TypeVar("_Record", Example, Comparison)


def curate_posts(placed: list[Placed[Example]], intake: Intake, config: DataConfig) -> dict[str, list[Placed[Example]]]:
    """Deal posts to train, valid and test, so that none is there twice and no two splits share one."""
    splits = _deal(placed, POST_SPLITS, {"valid": config.valid_fraction, "test": config.test_fraction})
    for split, items in splits.items():
        splits[split] = _without_duplicates(items, lambda item: item.record.post.id, intake, split)
    test = post_ids(splits["test"])
    held_out = test | post_ids(splits["valid"])
    splits["valid"] = _without_posts(splits["valid"], test, intake, "valid", "leak: also in posts-test")
    splits["train"] = _without_posts(splits["train"], held_out, intake, "train", "leak: also in a held-out split")
    return splits


def curate_comparisons(
    placed: list[Placed[Comparison]],
    intake: Intake,
    config: DataConfig,
    *,
    test_posts: set[str],
    min_words: int,
) -> dict[str, list[Placed[Comparison]]]:
    """Deal comparisons to train and valid; a source's test split counts as valid.

    Dropped are pairs of equal summaries, pairs with one under min_words, repeated rows, and training pairs
    over a post that is held out in the valid pairs or among test_posts.
    """
    fractions = {"valid": config.valid_fraction}
    splits = _deal([_test_as_valid(item) for item in placed], COMPARISON_SPLITS, fractions)
    for split, items in splits.items():
        telling = []
        for item in items:
            if reason := _useless(item.record, min_words):
                intake.drop(split, reason)
            else:
                telling.append(item)
        splits[split] = _without_duplicates(telling, _comparison_identity, intake, split)
    valid = post_ids(splits["valid"])
    train = _without_posts(splits["train"], test_posts, intake, "train", "leak: also in posts-test")
    splits["train"] = _without_posts(train, valid, intake, "train", "leak: also in comparisons-valid")
    return splits


def cap(
    items: list[Placed[_Record]], limit: int | None, *, seed: int, intake: Intake, split: str
) -> list[Placed[_Record]]:
    """Keep at most `limit` records, chosen by a seeded hash of their content, in their old order."""
    if limit is None or len(items) <= limit:
        return items
    ranks = [hashlib.sha256(f"{seed} {_identity(item.record)}".encode()).digest() for item in items]
    kept = sorted(sorted(range(len(items)), key=ranks.__getitem__)[:limit])
    intake.drop(split, "over the cap", len(items) - limit)
    return [items[index] for index in kept]


def post_ids(items: Iterable[Placed[_Record]]) -> set[str]:
    """The posts that these records are about."""
    return {item.record.post.id for item in items}


def _deal(
    placed: list[Placed[_Record]], names: tuple[str, ...], fractions: dict[str, float]
) -> dict[str, list[Placed[_Record]]]:
    """Sort records into splits; held-out splits that the source lacks are cut from train."""
    given = {item.split for item in placed}
    splits: dict[str, list[Placed[_Record]]] = {name: [] for name in names}
    for item in placed:
        split = item.split or "train"
        if split == "train" and (drawn := _drawn_split(item.record.post.id, fractions)) not in given:
            split = drawn
        splits[split].append(item)
    return splits


def _drawn_split(post_id: str, fractions: dict[str, float]) -> str:
    """A split by the post's hash: the same for every record about a post, on every machine."""
    position = int(post_id[:12], 16) / 16**12
    for name, fraction in fractions.items():
        if position < fraction:
            return name
        position -= fraction
    return "train"


def _test_as_valid(item: Placed[Comparison]) -> Placed[Comparison]:
    return Placed(item.record, item.place, "valid") if item.split == "test" else item


def _useless(comparison: Comparison, min_words: int) -> str:
    if comparison.chosen == comparison.rejected:
        return "equal summaries"
    if min(len(comparison.chosen.split()), len(comparison.rejected.split())) < min_words:
        return "summary too short"
    return ""


def _without_duplicates(
    items: list[Placed[_Record]], key: Callable[[Placed[_Record]], Hashable], intake: Intake, split: str
) -> list[Placed[_Record]]:
    """Keep the first of those that are the same."""
    first: dict[Hashable, Placed[_Record]] = {}
    for item in items:
        first.setdefault(key(item), item)
    intake.drop(split, "duplicate", len(items) - len(first))
    return list(first.values())


def _without_posts(
    items: list[Placed[_Record]], posts: set[str], intake: Intake, split: str, reason: str
) -> list[Placed[_Record]]:
    kept = [item for item in items if item.record.post.id not in posts]
    intake.drop(split, reason, len(items) - len(kept))
    return kept


def _comparison_identity(item: Placed[Comparison]) -> Hashable:
    """A pair judged twice alike, with the same margin, is one row copied."""
    record = item.record
    return record.post.id, record.chosen, record.rejected, record.margin


def _identity(record: Example | Comparison) -> str:
    if isinstance(record, Comparison):
        return f"{record.post.id} {record.chosen}\n{record.rejected}"
    return record.post.id
