"""The demo's world: what its numbers mean, that it is fair, and that it is the same for the same seed."""

import dataclasses
import statistics

import pytest

from rlhf.config import SyntheticConfig
from rlhf.data import Comparison, Example
from rlhf.synthetic import SyntheticData, count_claims, generate, gold_score
from rlhf.synthetic_wording import CLOSINGS, OPENINGS, SLOTS, SMALL_TALK

FACTS = {"who": "boss", "thing": "car", "day": "friday", "cost": "90"}
SMALL = SyntheticConfig(
    train_posts=1500, valid_posts=120, test_posts=150, train_comparisons=1500, valid_comparisons=400
)


@pytest.fixture(scope="module")
def world() -> SyntheticData:
    return generate(SMALL, seed=5)


@pytest.mark.parametrize(
    ("summary", "points"),
    [
        ("trouble with my boss, over a car, on friday, lost 90 dollars.", 100.0),
        ("out 90 dollars, that friday, about the car, my boss is the problem.", 100.0),  # any order and wording
        ("Trouble with my BOSS, over a car, on Friday, lost 90 dollars", 100.0),
        ("trouble with my boss, over a car.", 50.0),  # two of four facts
        ("trouble with my boss, over a bike.", 0 - 3),  # one right, one wrong; 7 words, 4 of them free
        ("trouble with my boss, over a car, in paris.", 25 - 1),  # the post names no place; 9 words, 8 free
        ("on friday, that friday.", 0.0),  # one fact, claimed twice; 4 words
        ("fight with my boss, anyway thanks so much for reading all of this.", 25 - 9),  # 13 words, 4 free
        ("", 0.0),
        ("one two three", -3.0),
        ("lost car dollars, over a friday", -6.0),  # nonsense claims nothing
        ("over a bike, " * 5, -100.0),  # the floor
    ],
)
def test_gold_score_worked_out_by_hand(summary: str, points: float) -> None:
    assert gold_score(FACTS, summary) == pytest.approx(points)


def test_claims_are_counted_once_right_and_else_false() -> None:
    text = "my boss is the problem, fight with my boss, on monday, on friday, out 90 dollars."
    assert count_claims(FACTS, text) == (3, 2)


@pytest.mark.parametrize("slot", list(SLOTS))
def test_every_claim_in_every_wording_is_recognised(slot: str) -> None:
    for wording in SLOTS[slot].claims:
        for value in SLOTS[slot].values:
            assert count_claims({slot: value}, f"so, {wording.format(value)}, anyway") == (1, 0)
            assert count_claims({"other": "none"}, f"{wording.format(value)}.") == (0, 1)


def test_talk_about_nothing_claims_nothing() -> None:
    for text in (*OPENINGS, *CLOSINGS, *SMALL_TALK):
        assert count_claims(FACTS, text) == (0, 0)


def test_a_value_belongs_to_one_slot() -> None:
    values = [value for slot in SLOTS.values() for value in slot.values]
    assert len(values) == len(set(values))


def test_same_seed_same_world_other_seed_another() -> None:
    few = dataclasses.asdict(generate(SMALL.model_copy(update={"train_posts": 50}), seed=3))
    again = dataclasses.asdict(generate(SMALL.model_copy(update={"train_posts": 50}), seed=3))
    other = dataclasses.asdict(generate(SMALL.model_copy(update={"train_posts": 50}), seed=4))
    assert few == again
    assert few["posts"]["test"] != other["posts"]["test"]


def test_no_post_is_there_twice_within_or_across_splits(world: SyntheticData) -> None:
    ids = [example.post.id for examples in world.posts.values() for example in examples]
    assert len(ids) == 1500 + 120 + 150
    assert len(set(ids)) == len(ids)


def test_comparisons_stay_within_their_split(world: SyntheticData) -> None:
    for split, comparisons in world.comparisons.items():
        posts = {example.post.id for example in world.posts[split]}
        assert {comparison.post.id for comparison in comparisons} <= posts
    assert {split: len(rows) for split, rows in world.comparisons.items()} == {"train": 1500, "valid": 400}


def test_posts_state_their_facts_and_name_misleading_values(world: SyntheticData) -> None:
    misled = 0
    for example in world.posts["test"]:
        facts = example.extra["facts"]
        words = example.post.body.replace(".", "").replace("?", "").split()
        assert 4 <= len(facts) <= 5
        assert all(value in words for value in facts.values())
        misled += any(value in words for slot in facts for value in SLOTS[slot].values if value != facts[slot])
    assert misled > 75  # of 150


def test_references_are_deficient_and_often_enough_good(world: SyntheticData) -> None:
    golds = [gold_score(example.extra["facts"], example.summary) for example in world.posts["train"]]
    assert 40 < statistics.mean(golds) < 60
    assert 0.2 < statistics.mean(gold > 95 for gold in golds) < 0.4


def test_judges_go_by_gold_and_err_at_their_rate(world: SyntheticData) -> None:
    rows = world.comparisons["train"]
    for row in rows:
        right = row.extra["gold_chosen"] > row.extra["gold_rejected"]
        assert right is not row.extra["flipped"]
        assert row.extra["gold_chosen"] != row.extra["gold_rejected"]
    share = statistics.mean(row.extra["flipped"] for row in rows)
    assert share == pytest.approx(0.1, abs=3 * (0.1 * 0.9 / 1500) ** 0.5)


def test_judges_who_never_err_always_choose_the_better() -> None:
    config = SMALL.model_copy(update={"judge_error_rate": 0.0, "train_posts": 50, "train_comparisons": 100})
    for row in generate(config, seed=1).comparisons["train"]:
        assert row.extra["gold_chosen"] > row.extra["gold_rejected"]
        assert row.extra["flipped"] is False


def test_length_alone_tells_little_of_quality(world: SyntheticData) -> None:
    wins = []
    for row in world.comparisons["train"]:
        longer = len(row.chosen.split()) - len(row.rejected.split())
        wins.append(0.5 if longer == 0 else float((longer > 0) is not row.extra["flipped"]))
    assert 0.4 < statistics.mean(wins) < 0.6


def test_rows_survive_being_written_and_read(world: SyntheticData) -> None:
    example, comparison = world.posts["valid"][0], world.comparisons["valid"][0]
    assert Example.from_row(example.to_row()) == example
    assert Comparison.from_row(comparison.to_row()) == comparison
