"""The scoring benchmark compares ways that give the same scores; what it measures is for people."""

from __future__ import annotations

import pytest

from tests.benchmarks.scoring import CASES, MAX_TOKENS, measure, texts


@pytest.mark.parametrize("case", CASES)
def test_all_ways_give_the_same_scores(case: str) -> None:
    costs = measure(case, posts=2, layers=2, hidden=64, vocabulary=64, rounds=1)
    assert costs.sequences == 2 * CASES[case]
    assert costs.difference < 1e-5
    assert costs.over_padded == costs.padded / costs.scorer > 0
    assert costs.over_trlx == costs.trlx / costs.scorer > 0


def test_texts_fit_and_differ() -> None:
    posts = texts(8, 4, vocabulary=2048)
    lengths = {len(ids) for post in posts for ids in post}
    assert max(lengths) <= MAX_TOKENS
    assert len(lengths) > 10
    assert [len(post) for post in posts] == [5] * 8
