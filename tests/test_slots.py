"""Continuous batching: what a row writes does not depend on who runs beside it."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation import BuiltinEngine
from rlhf.sampling import Sampling
from rlhf.slots import NextToken, Request, RunningBatch
from tests.fakes import EOS_ID, MODELS, PAD_ID, tiny_policy
from tests.test_generation import prefer_eos
from tests.test_kv_cache import prompts_of

GREEDY = Sampling(max_new_tokens=12, temperature=0)
SAMPLED = Sampling(max_new_tokens=12, temperature=1.3, top_p=0.9)


def batch_of(kind: str = "gptj", slots: int = 4, eos: float = 0.0) -> RunningBatch:
    model = MODELS[kind]()
    if kind == "gptj":
        prefer_eos(model, eos)
    return BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID).open(slots)


def run_all(batch: RunningBatch, arrivals: dict[int, dict[int, Request]]) -> dict[int, list[NextToken]]:
    """Let requests join before the steps that `arrivals` names, until all are done; the tokens by key."""
    heard: dict[int, list[NextToken]] = {}
    step = 0
    waiting = dict(arrivals)
    while waiting or any(news[-1].finish is None for news in heard.values()):
        news = batch.add(waiting.pop(step)) if step in waiting else []
        for new in [*news, *batch.step()]:
            heard.setdefault(new.key, []).append(new)
        step += 1
        assert step < 200
    return heard


def tokens(heard: dict[int, list[NextToken]]) -> dict[int, list[int]]:
    return {key: [new.token for new in news] for key, news in heard.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_summary_does_not_depend_on_its_neighbours(kind: str, sampling: Sampling) -> None:
    requests = {key: Request(prompt, sampling, (1, key)) for key, prompt in enumerate(prompts_of(9, 30, 1, 44, 17))}
    arrivals = {0: {0: requests[0], 1: requests[1]}, 3: {2: requests[2]}, 5: {3: requests[3]}, 14: {4: requests[4]}}
    together = tokens(run_all(batch_of(kind), arrivals))
    alone = {key: tokens(run_all(batch_of(kind), {0: {key: request}}))[key] for key, request in requests.items()}
    assert together == alone
    assert len({tuple(written) for written in together.values()}) > 3


def test_greedy_is_what_the_engine_writes_all_at_once() -> None:
    model = prefer_eos(tiny_policy(), 2.0)
    engine = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID)
    prompts = prompts_of(9, 30, 1, 44)
    at_once = engine.generate(prompts, GREEDY)
    heard = run_all(engine.open(4), {0: {key: Request(prompt, GREEDY, (0,)) for key, prompt in enumerate(prompts)}})
    for key, written in tokens(heard).items():
        assert written == at_once.response_BR[key][at_once.response_mask_BR[key]].tolist()
    assert [heard[key][-1].finish == "stop" for key in range(4)] == at_once.ended_B.tolist()


def test_requests_of_all_kinds_share_a_batch() -> None:
    kinds = [
        GREEDY,
        SAMPLED,
        Sampling(max_new_tokens=5, temperature=0.7, top_k=3),
        Sampling(max_new_tokens=12, temperature=0, min_new_tokens=12),
    ]
    requests = {key: Request([5, 6, 7], sampling, (key,)) for key, sampling in enumerate(kinds)}
    together = run_all(batch_of(eos=20.0), {0: requests})
    for key, request in requests.items():
        assert together[key] == run_all(batch_of(eos=20.0), {0: {key: request}})[key]
    # EOS is all but certain: only where it is kept out does a row go on.
    assert [len(together[key]) for key in range(4)] == [1, 1, 1, 12]
    assert [together[key][-1].finish for key in range(4)] == ["stop", "stop", "stop", "length"]


def test_the_seed_alone_decides_what_is_sampled() -> None:
    [prompt] = prompts_of(9)
    seeds = [(1, 0), (1, 1), (1, 0)]
    heard = run_all(batch_of(), {0: {key: Request(prompt, SAMPLED, seed) for key, seed in enumerate(seeds)}})
    written = tokens(heard)
    assert written[0] == written[2] != written[1]


def test_an_aborted_row_frees_its_place() -> None:
    batch = batch_of(slots=2, eos=-50.0)
    first, second, third = (Request(prompt, GREEDY, (0,)) for prompt in prompts_of(9, 30, 12))
    alone = tokens(run_all(batch_of(eos=-50.0), {0: {1: second}}))[1]
    news = batch.add({0: first, 1: second})
    assert batch.room == 0
    batch.abort({0, 99})
    assert batch.room == 1
    news += batch.add({2: third})
    while batch.room < 2:
        news += batch.step()
    assert [new.token for new in news if new.key == 1] == alone
    assert [new.key for new in news].count(0) == 1  # what came before it was aborted
    assert [new.finish for new in news if new.key == 2][-1] == "length"


def test_what_the_model_cannot_take_lets_nobody_in() -> None:
    batch = batch_of()
    good = Request([1, 2, 3], GREEDY, (0,))
    with pytest.raises(ValueError, match="token id 999"):
        batch.add({0: good, 1: Request([999], GREEDY, (0,))})
    with pytest.raises(ValueError, match="positions"):
        batch.add({0: good, 1: Request([1] * 120, GREEDY, (0,))})
    assert batch.room == 4
    assert batch.step() == []


def test_logits_that_are_not_finite_end_their_row_alone() -> None:
    model = tiny_policy()
    with torch.no_grad():
        model.transformer.wte.weight[77] = torch.nan
    batch = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID).open(2)
    good, bad = Request([1, 2, 3], GREEDY, (0,)), Request([1, 77] * 10, GREEDY, (0,))
    long = Request([1, 2, 3] * 10, GREEDY, (0,))
    sound = tokens(run_all(batch_of(eos=0.0), {0: {1: good}}))[1]
    heard = run_all(batch, {0: {0: good, 1: bad}})
    assert [new.finish for new in heard[1]] == ["failed"]
    assert [new.token for new in heard[0]] == sound
    # Whoever takes its place next sees nothing of it, not even behind a mask.
    heard = run_all(batch, {0: {2: long}, 1: {3: good}})
    assert [new.token for new in heard[3]] == sound
