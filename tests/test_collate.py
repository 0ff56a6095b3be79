"""Batches, what counts in them and order, written out by hand; and the learning-rate curve."""

import numpy as np
import pytest

from rlhf.collate import (
    EncodedExample,
    ExampleBatch,
    LengthGroupedSampler,
    pack_examples,
    pair_id,
    token_ids,
)
from rlhf.config import OptimizerConfig
from rlhf.data import Comparison
from rlhf.prompt import Post
from rlhf.schedule import learning_rate_factor

EOS = 9


def example(prompt, response):
    return EncodedExample("post", prompt=token_ids(prompt), response=token_ids(response))


def kept_ids(batch: ExampleBatch) -> list[int]:
    ids: list[int] = batch.packed.pick(batch.packed.ids_N).tolist()
    return ids


def test_what_counts_is_the_summary_and_eos() -> None:
    batch = pack_examples([example([1, 2, 3], [4, EOS]), example([5], [6, EOS])], loss_on="summary")
    assert batch.packed.ids_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.packed.positions_N.tolist() == [0, 1, 2, 3, 0, 1]
    # Read where a token is chosen: 4 after 3, EOS after 4.
    assert kept_ids(batch) == [3, 4, 5, 6]
    assert batch.targets_K.tolist() == [4, EOS, 6, EOS]
    assert (batch.counted, batch.tokens) == (4, 8)


def test_loss_on_all_counts_the_prompt_but_not_its_first_token() -> None:
    batch = pack_examples([example([1, 2], [EOS]), example([5], [EOS])], loss_on="all")
    assert kept_ids(batch) == [1, 2, 5]
    assert batch.targets_K.tolist() == [2, EOS, EOS]
    assert (batch.counted, batch.tokens) == (3, 5)
    # Of a sequence without a prompt the first token is predicted from nothing, too.
    assert pack_examples([example([], [7, EOS])], loss_on="summary").targets_K.tolist() == [EOS]


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
    # The shortest first, so that micro-batches of the step are of like length.
    assert list(LengthGroupedSampler([3, 1, 2], batch_size=8, seed=1)) == [1, 2, 0]


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
