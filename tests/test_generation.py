"""Generation: the tokens that transformers gives, at the log-probabilities of a plain pass, in any batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import RlhfError
from rlhf.generation import BuiltinEngine, Generation, Sampling, summarize
from rlhf.sampling import _narrow, choose_tokens
from rlhf.sequences import left_pad
from tests.benchmarks import generation as benchmark
from tests.fakes import EOS_ID, MODELS, PAD_ID, POSITIONS, SHAPE, tiny_policy

LENGTHS = (23, 1, 7, 40, 7, 90)


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def engine(model: PreTrainedModel) -> BuiltinEngine:
    return BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID)


def prefer_eos(model: PreTrainedModel, logit: float) -> PreTrainedModel:
    """Make the model (GPT-J: its head has a bias) end sooner the higher the logit."""
    with torch.no_grad():
        model.lm_head.bias[EOS_ID] = logit
    return model


def responses(generation: Generation) -> list[list[int]]:
    rows = zip(generation.response_BR, generation.response_mask_BR, strict=True)
    return [ids_R[mask_R].tolist() for ids_R, mask_R in rows]


def plain_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """The same numbers by one unpadded pass, without a cache."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    logprobs_RV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1] / temperature, dim=-1)
    return logprobs_RV[torch.arange(len(response)), torch.tensor(response)]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_are_those_of_transformers(kind: str) -> None:
    model, prompts = MODELS[kind](), prompts_of(LENGTHS)
    ours = engine(model).generate(prompts, Sampling(max_new_tokens=20, temperature=0))
    ids_BP, mask_BP = left_pad(prompts, PAD_ID)
    theirs = model.generate(
        input_ids=ids_BP, attention_mask=mask_BP.long(), do_sample=False, max_new_tokens=20, pad_token_id=PAD_ID
    )
    assert torch.equal(ours.response_BR, theirs[:, ids_BP.shape[1] :])
    assert len({tuple(response) for response in responses(ours)}) > 3  # the model does not babble alike everywhere


@pytest.mark.parametrize("kind", MODELS)
def test_a_greedy_response_does_not_depend_on_the_batch(kind: str) -> None:
    model = MODELS[kind]()
    if kind == "gptj":
        prefer_eos(model, 3.0)  # rows end at different steps, so that the batch shrinks on the way
    prompts, greedy = prompts_of(LENGTHS), Sampling(max_new_tokens=24, temperature=0)
    together = engine(model).generate(prompts, greedy)
    for number, (prompt, response) in enumerate(zip(prompts, responses(together), strict=True)):
        alone = engine(model).generate([prompt], greedy)
        assert responses(alone) == [response]
        torch.testing.assert_close(
            alone.logprobs_BR[0], together.logprobs_BR[number, : len(response)], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [
        (Sampling(max_new_tokens=16), 1.0),
        (Sampling(max_new_tokens=16, temperature=0.7), 0.7),
        (Sampling(max_new_tokens=16, temperature=0), 1.0),
        (Sampling(max_new_tokens=16, temperature=1.3, top_k=5, top_p=0.8, min_new_tokens=16), 1.3),
    ],
)
def test_logprobs_are_those_of_the_full_softmax(kind: str, sampling: Sampling, temperature: float) -> None:
    model, prompts = MODELS[kind](), prompts_of(LENGTHS)
    if kind == "gptj":
        prefer_eos(model, 2.0)
    generation = engine(model).generate(prompts, sampling, generator=torch.Generator().manual_seed(3))
    assert generation.logprobs_BR.dtype == torch.float32
    for number, (prompt, response) in enumerate(zip(prompts, responses(generation), strict=True)):
        expected_R = plain_logprobs(model, prompt, response, temperature)
        actual_R = generation.logprobs_BR[number, : len(response)]
        torch.testing.assert_close(actual_R, expected_R, atol=1e-4, rtol=0)


def test_samples_follow_the_distribution() -> None:
    model, prompt, count = tiny_policy(scale=30.0), prompts_of((12,))[0], 4000
    sampled = engine(model).generate(
        [prompt] * count, Sampling(max_new_tokens=1, temperature=1.5), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected_V = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5, dim=-1) * count
    seen_V = torch.bincount(sampled.response_BR[:, 0], minlength=SHAPE.vocab_size).float()
    common = expected_V >= 5
    pooled_expected = torch.cat([expected_V[common], expected_V[~common].sum()[None]])
    pooled_seen = torch.cat([seen_V[common], seen_V[~common].sum()[None]])
    freedom = len(pooled_seen) - 1
    chi_square = float(((pooled_seen - pooled_expected) ** 2 / pooled_expected).sum())
    assert freedom > 20
    assert pooled_expected.min() >= 5
    # The statistic has mean `freedom` and variance 2 · freedom; 4 deviations are beyond chance.
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_chance_picks_the_token_at_which_the_distribution_passes_it() -> None:
    # Probabilities 0, 1/4, 1/2, 0, 1/4, 0: their sums pass at 0.25, 0.75 and 1.
    logits_AV = torch.tensor([[0, 1, 2, 0, 1, 0]]).log().repeat(7, 1)
    chances_A = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999, 1 - 2**-53], dtype=torch.float64)
    tokens_A, _ = choose_tokens(logits_AV, Sampling(max_new_tokens=1), chances_A)
    assert tokens_A.tolist() == [1, 1, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.9, "temperature": 1.3}])
@pytest.mark.parametrize("blocked", [None, 5])
def test_one_pass_chooses_what_a_distribution_function_of_probabilities_does(
    settings: dict[str, float], blocked: int | None
) -> None:
    sampling = Sampling(max_new_tokens=1, **settings)  # type: ignore[arg-type]
    chances = torch.Generator().manual_seed(0)
    logits_AV = 4 * torch.randn(64, 5000, generator=chances)
    chances_A = torch.rand(64, generator=chances, dtype=torch.float64)
    tokens_A, logprobs_A = choose_tokens(logits_AV, sampling, chances_A, blocked=blocked)

    narrowed_AV = logits_AV.clone()
    if blocked is not None:
        narrowed_AV[:, blocked] = -torch.inf
    narrowed_AV = _narrow(narrowed_AV / sampling.temperature, sampling)
    cumulative_AV = narrowed_AV.double().softmax(dim=-1).cumsum(dim=-1)
    expected_A = (cumulative_AV <= (chances_A * cumulative_AV[:, -1])[:, None]).sum(dim=-1)
    assert torch.equal(tokens_A, expected_A)
    full_AV = (logits_AV / sampling.temperature).log_softmax(dim=-1)
    torch.testing.assert_close(logprobs_A, full_AV.gather(1, expected_A[:, None]).squeeze(1), atol=1e-5, rtol=1e-5)


def test_temperature_top_k_and_top_p_narrow_the_choice() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    chances_A = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def shares(**settings: float) -> list[float]:
        sampling = Sampling(max_new_tokens=1, **settings)  # type: ignore[arg-type]
        tokens_A, _ = choose_tokens(logits_V.repeat(1000, 1), sampling, chances_A)
        return (torch.bincount(tokens_A, minlength=4) / 1000).tolist()

    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=2e-3)
    # Squares: 0.01, 0.16, 0.04, 0.09 of 0.30.
    assert shares(temperature=0.5) == pytest.approx([0.0333, 0.5333, 0.1333, 0.3], abs=2e-3)
    assert shares(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    # 0.4 is below 0.6, so the next likeliest comes in; 0.7 is not.
    assert shares(top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    assert shares(top_p=0.3) == [0, 1, 0, 0]
    assert shares(top_k=9, top_p=1.0) == shares()
    greedy, _ = choose_tokens(logits_V[None], Sampling(max_new_tokens=1, temperature=0), chances_A[:1])
    assert greedy.tolist() == [1]


def test_a_narrowed_choice_keeps_its_full_probability() -> None:
    logits_AV = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def chosen(chance: float, blocked: int | None = None, **settings: float) -> tuple[int, float]:
        sampling = Sampling(max_new_tokens=1, **settings)  # type: ignore[arg-type]
        chance_A = torch.tensor([chance], dtype=torch.float64)
        token_A, logprob_A = choose_tokens(logits_AV, sampling, chance_A, blocked=blocked)
        return int(token_A), math.exp(float(logprob_A))

    assert chosen(0.9, top_k=2) == (3, pytest.approx(0.3))
    assert chosen(0.9, temperature=0.5) == (3, pytest.approx(0.09 / 0.30))
    assert chosen(0.0, temperature=0) == (1, pytest.approx(0.4))
    # Without the likeliest: 0.1, 0.2 and 0.3 of 0.6 in turn.
    assert chosen(0.4, blocked=1) == (2, pytest.approx(0.2))
    assert chosen(0.0, blocked=1, temperature=0) == (3, pytest.approx(0.3))
    assert chosen(0.0, blocked=1, top_k=1) == (3, pytest.approx(0.3))


def test_a_blocked_token_may_outweigh_all_others_by_far() -> None:
    logits_AV = torch.tensor([[1.0, 30.0, 1.0, 1.01]])
    cold = Sampling(max_new_tokens=1, temperature=0.01)
    # Divided by 0.01: 100, 3000, 100 and 101; without the second 1/(2 + e) each for two, e/(2 + e) for the last.
    chances_A = torch.tensor([0.2, 0.4, 0.43], dtype=torch.float64)
    tokens_A, logprobs_A = choose_tokens(logits_AV.expand(3, -1), cold, chances_A, blocked=1)
    assert tokens_A.tolist() == [0, 2, 3]
    assert logprobs_A.tolist() == pytest.approx([-2900, -2900, -2899])


def test_the_same_seed_gives_the_same_samples() -> None:
    model, prompts, sampling = prefer_eos(tiny_policy(), 3.0), prompts_of(LENGTHS), Sampling(max_new_tokens=20)

    def sample(seed: int) -> Generation:
        return engine(model).generate(prompts, sampling, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(5).response_BR, sample(5).response_BR)
    assert torch.equal(sample(5).logprobs_BR, sample(5).logprobs_BR)
    assert responses(sample(5)) != responses(sample(6))


def test_without_a_generator_torchs_own_seed_counts() -> None:
    model, prompts, sampling = tiny_policy(), prompts_of(LENGTHS), Sampling(max_new_tokens=5)
    rows = []
    for _ in range(2):
        torch.manual_seed(11)
        rows.append(responses(engine(model).generate(prompts, sampling)))
    assert rows[0] == rows[1]


def test_what_a_row_samples_does_not_depend_on_when_others_end() -> None:
    prompts, sampling = prompts_of((9,) * 16), Sampling(max_new_tokens=20)
    eager = engine(prefer_eos(tiny_policy(), 4.0))
    # The same draws without EOS ever ending a row: no row leaves the batch.
    never = BuiltinEngine(prefer_eos(tiny_policy(), 4.0), eos_id=SHAPE.vocab_size, pad_id=PAD_ID)
    short = eager.generate(prompts, sampling, generator=torch.Generator().manual_seed(2))
    long = never.generate(prompts, sampling, generator=torch.Generator().manual_seed(2))
    lengths = [len(response) for response in responses(short)]
    assert 1 < sum(lengths) / 16 < 10
    assert [row[:length] for row, length in zip(long.response_BR.tolist(), lengths, strict=True)] == responses(short)


def test_eos_is_counted_and_ends_a_row() -> None:
    generation = engine(prefer_eos(tiny_policy(), 3.0)).generate(
        prompts_of((9,) * 12), Sampling(max_new_tokens=15), generator=torch.Generator().manual_seed(0)
    )
    rows = responses(generation)
    assert [EOS_ID in row for row in rows] == generation.ended_B.tolist()
    assert set(generation.ended_B.tolist()) == {True, False}
    for number, row in enumerate(rows):
        assert EOS_ID not in row[:-1]
        assert generation.response_BR[number, len(row) :].eq(PAD_ID).all()
        assert generation.logprobs_BR[number, len(row) :].eq(0).all()
        assert generation.logprobs_BR[number, : len(row)].lt(0).all()
    assert generation.response_BR.dtype == torch.int64
    assert generation.response_mask_BR.dtype == torch.bool


def test_eos_first_and_eos_never() -> None:
    prompts = prompts_of((4, 11))
    first = engine(prefer_eos(tiny_policy(), 1e4)).generate(prompts, Sampling(max_new_tokens=9))
    assert first.response_BR.tolist() == [[EOS_ID], [EOS_ID]]
    assert first.response_mask_BR.tolist() == [[True], [True]]
    assert first.ended_B.tolist() == [True, True]
    never = engine(prefer_eos(tiny_policy(), -1e4)).generate(prompts, Sampling(max_new_tokens=9))
    assert never.response_mask_BR.tolist() == [[True] * 9] * 2
    assert never.ended_B.tolist() == [False, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_new_tokens_puts_eos_off(temperature: float) -> None:
    model, prompts = prefer_eos(tiny_policy(), 20.0), prompts_of((4, 11))
    sampling = Sampling(max_new_tokens=9, min_new_tokens=3, temperature=temperature)
    generation = engine(model).generate(prompts, sampling)
    assert [len(row) for row in responses(generation)] == [4, 4]
    # EOS is still what the model thinks likeliest, and the log-probabilities say so.
    assert generation.logprobs_BR[:, :3].lt(-10).all()
    assert generation.logprobs_BR[:, 3].gt(-0.01).all()


def test_a_model_in_training_stays_as_it_was() -> None:
    model, prompts = tiny_policy(), prompts_of(LENGTHS)
    expected = responses(engine(model).generate(prompts, Sampling(max_new_tokens=6, temperature=0)))
    model.gradient_checkpointing_enable()
    model.train()
    generation = engine(model).generate(prompts, Sampling(max_new_tokens=6, temperature=0))
    assert responses(generation) == expected
    assert model.training
    # What is sampled goes into training: autograd takes the tensors.
    assert not generation.logprobs_BR.requires_grad
    assert not generation.logprobs_BR.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * generation.logprobs_BR).sum().backward()
    assert weight.grad is not None


def test_bfloat16_runs_and_reports_float32_logprobs() -> None:
    model = tiny_policy().to(torch.bfloat16)
    generation = engine(model).generate(prompts_of(LENGTHS), Sampling(max_new_tokens=5))
    assert generation.logprobs_BR.dtype == torch.float32
    assert generation.response_BR.shape == (6, 5)


def test_sync_takes_over_weights() -> None:
    old, new, prompts, greedy = tiny_policy(), tiny_policy(seed=1), prompts_of(LENGTHS), Sampling(8, temperature=0)
    synced = engine(old)
    before = responses(synced.generate(prompts, greedy))
    synced.sync(new.state_dict())
    after = responses(synced.generate(prompts, greedy))
    assert after == responses(engine(new).generate(prompts, greedy)) != before


def test_weights_that_are_not_finite_are_reported() -> None:
    model = tiny_policy()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(RlhfError, match="not finite"):
            engine(model).generate([[5, 6]], Sampling(max_new_tokens=3, temperature=temperature))


def test_left_pad() -> None:
    ids_BP, mask_BP = left_pad([[5], [6, 7, 8]], 1)
    assert ids_BP.tolist() == [[1, 1, 5], [6, 7, 8]]
    assert mask_BP.tolist() == [[False, False, True], [True, True, True]]


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ([], "no prompts"),
        ([[5], []], "prompt 1 is empty"),
        ([[5, 260]], "prompt 0 has token id 260, outside the model's vocabulary of 260"),
        ([[-1]], "token id -1"),
        ([[5] * (POSITIONS - 3)], "prompt 0 has 125 tokens and 4 to generate, more than the model's 128 positions"),
    ],
)
def test_prompts_that_the_model_cannot_take(prompts: list[list[int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        engine(tiny_policy()).generate(prompts, Sampling(max_new_tokens=4))
    assert "\n" not in str(caught.value)


def test_a_prompt_may_fill_the_positions() -> None:
    generation = engine(tiny_policy()).generate([[5] * (POSITIONS - 4)], Sampling(max_new_tokens=4, min_new_tokens=4))
    assert generation.response_BR.shape == (1, 4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens=5"),
        ({"max_new_tokens": 4, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 4, "temperature": math.nan}, "temperature=nan"),
        ({"max_new_tokens": 4, "top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 4, "top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_sampling_that_makes_no_sense(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Sampling(**settings)  # type: ignore[arg-type]


def test_summaries_come_back_in_order() -> None:
    model, prompts, greedy = prefer_eos(tiny_policy(), 3.0), prompts_of((*LENGTHS, 3)), Sampling(12, temperature=0)
    heard: list[int] = []
    summaries = summarize(engine(model), prompts, greedy, batch_size=3, on_progress=heard.append)
    expected = [engine(model).generate([prompt], greedy) for prompt in prompts]
    assert summaries.responses == [responses(generation)[0] for generation in expected]
    assert summaries.ended == [bool(generation.ended_B[0]) for generation in expected]
    assert heard == [3, 6, 7]
    lengths = [len(response) for response in summaries.responses]
    assert summaries.mean_tokens == pytest.approx(sum(lengths) / 7)
    assert summaries.ended_fraction == pytest.approx(sum(summaries.ended) / 7)


def test_the_benchmark_measures_both(tmp_path: Path) -> None:
    small = "--layers 1 --hidden 16 --heads 2 --rotary 4 --vocabulary 64 --rows 3 --prompt 9 --response 4 --repeats 1"
    benchmark.main([*small.split(), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows_alike"] == 1
    assert found["ratio"] == pytest.approx(found["transformers_seconds"] / found["ours_seconds"])
