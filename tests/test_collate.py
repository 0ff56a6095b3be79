"""Batches, labels and order, written out by hand; and the learning-rate curve."""

import numpy as np
import pytest

from rlhf.collate import (
    EncodedExample,
    EncodedPair,
    ExampleCollator,
    LengthGroupedSampler,
    PairCollator,
    pair_id,
    token_ids,
)
from rlhf.config import OptimizerConfig
from rlhf.data import Comparison
from rlhf.prompt import Post
from rlhf.schedule import learning_rate_factor

PAD, EOS = 0, 9


def example(prompt, response):
    return EncodedExample("post", prompt=token_ids(prompt), response=token_ids(response))


def test_labels_cover_summary_and_eos_only():
    batch = ExampleCollator(pad_id=PAD)([example([1, 2, 3], [4, EOS]), example([5], [6, EOS])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, EOS], [5, 6, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, EOS], [-100, 6, EOS, -100, -100]]
    assert batch["logits_to_keep"].tolist() == [0, 1, 2, 3]


def test_logits_are_kept_only_where_some_next_token_counts():
    batch = ExampleCollator(pad_id=PAD)([example([1, 2, 3, 3], [4, EOS]), example([5, 5, 5], [EOS])])
    # Labels stand at positions 4, 5 and 3; each is predicted one position earlier.
    assert batch["logits_to_keep"].tolist() == [2, 3, 4]


def test_loss_on_all_counts_the_prompt_but_no_padding():
    batch = ExampleCollator(pad_id=PAD, loss_on="all")([example([1, 2], [EOS]), example([5], [EOS])])
    assert batch["labels"].tolist() == [[1, 2, EOS], [5, EOS, -100]]
    assert batch["logits_to_keep"].tolist() == [0, 1]


def test_pairs_are_stacked_chosen_first():
    pairs = [
        EncodedPair("pair", prompt=token_ids([1]), chosen=token_ids([2, EOS]), rejected=token_ids([3, 3, EOS])),
        EncodedPair("pair", prompt=token_ids([4]), chosen=token_ids([5, EOS]), rejected=token_ids([6, EOS])),
    ]
    batch = PairCollator(pad_id=PAD)(pairs)
    assert batch["input_ids"].tolist() == [[1, 2, EOS, PAD], [4, 5, EOS, PAD], [1, 3, 3, EOS], [4, 6, EOS, PAD]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 3, 4, 3]
    assert pairs[0].length == 4


def test_two_pairs_of_a_post_have_ids_of_their_own():
    post = Post(subreddit="pets", title="a", body="b")
    ids = [pair_id(Comparison(post, *texts, "judge")) for texts in (("good", "bad"), ("bad", "good"), ("goo", "dbad"))]
    assert len(set(ids)) == 3
    assert {one.partition("-")[0] for one in ids} == {post.id}
    assert ids[0] == pair_id(Comparison(post, "good", "bad", "judge"))


def test_a_batch_holds_similar_lengths_and_an_epoch_everything_once():
    lengths = np.random.default_rng(0).integers(10, 200, size=403)
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(403))
    batches = np.array(order[:400]).reshape(50, 8)
    spread = lengths[batches].max(axis=1) - lengths[batches].min(axis=1)
    # 400 lengths over a range of 190, sorted, leave about 4 within a batch; random batches leave 150.
    assert spread.mean() < 10
    assert lengths[order[:8]].max() == lengths[batches].max()


def test_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(40))
    orders = {}
    for seed, epoch in [(1, 0), (1, 1), (2, 0)]:
        sampler = LengthGroupedSampler(lengths, batch_size=4, seed=seed)
        sampler.epoch = epoch
        orders[seed, epoch] = list(sampler)
        assert list(sampler) == orders[seed, epoch]
    assert orders[1, 0] != orders[1, 1]
    assert orders[1, 0] != orders[2, 0]


def test_fewer_examples_than_a_batch_are_one_batch():
    assert sorted(LengthGroupedSampler([3, 1, 2], batch_size=8, seed=1)) == [0, 1, 2]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (2, 0.75), (3, 1.0), (7, 0.55), (11, 0.1), (100, 0.1)])
def test_cosine_rises_to_the_peak_and_ends_at_the_final_rate(step, factor):
    config = OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=3, schedule="cosine")
    assert learning_rate_factor(step, total=11, config=config) == pytest.approx(factor)


@pytest.mark.parametrize(("schedule", "factor"), [("linear", 0.75), ("constant", 1.0)])
def test_other_schedules_a_quarter_of_the_way(schedule, factor):
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule=schedule)
    assert learning_rate_factor(5, total=20, config=config) == pytest.approx(factor)


def test_equal_rates_make_a_flat_cosine():
    config = OptimizerConfig(learning_rate=5e-6, final_learning_rate=5e-6, warmup_steps=0)
    assert [learning_rate_factor(step, total=10, config=config) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]
