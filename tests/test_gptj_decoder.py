"""GPT-J's own decoder: the logits of a plain pass and of the general decoder, whoever joins or leaves beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPTJForCausalLM, PreTrainedModel

from rlhf.adapters import add_adapters
from rlhf.block_linears import ROWS_WORTH_PACKING, STEPS_WORTH_PACKING, linears_of
from rlhf.config import LoraConfig
from rlhf.decoding import open_decoder
from rlhf.generation import BuiltinEngine, Sampling
from rlhf.gptj_decoder import GptjDecoder
from rlhf.kv_cache import Decoder
from rlhf.row_buffers import COLUMNS_AT_ONCE
from rlhf.sequences import left_pad
from tests.fakes import EOS_ID, PAD_ID, SHAPE, tiny_llama, tiny_policy
from tests.test_generation import LENGTHS, prefer_eos, prompts_of


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The next token's, by one pass of transformers' model without padding or cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def assert_plain(model: PreTrainedModel, logits_AV: Tensor, sequences: list[list[int]]) -> None:
    expected_AV = torch.stack([plain_logits(model, ids) for ids in sequences])
    # The scaled weights make logits of up to about 50.
    torch.testing.assert_close(logits_AV, expected_AV, atol=1e-4, rtol=1e-5)


def test_gptj_is_run_by_its_own_decoder_and_others_by_the_general_one() -> None:
    assert isinstance(open_decoder(tiny_policy(), rows=1, pad_id=PAD_ID), GptjDecoder)
    assert isinstance(open_decoder(tiny_llama(), rows=1, pad_id=PAD_ID), Decoder)


@torch.no_grad()
def test_both_decoders_give_the_same_logits() -> None:
    model, prompts = tiny_policy(scale=1.0), prompts_of(LENGTHS)
    own, general = GptjDecoder(model, rows=len(prompts)), Decoder(model, rows=len(prompts), pad_id=PAD_ID)
    assert_equal(own.join(prompts, room=12), general.join(prompts, room=12))
    for step in range(12):
        tokens_A = torch.arange(len(own)) * 7 + step
        assert_equal(own.step(tokens_A), general.step(tokens_A))
        if step in (3, 7):
            assert own.leave([1, 0]) == general.leave([1, 0])


@torch.no_grad()
def test_rows_join_and_leave_without_changing_the_others() -> None:
    model = tiny_policy()
    decoder = GptjDecoder(model, rows=4)
    sequences = prompts_of((9, 30))
    assert_plain(model, decoder.join(sequences, room=70), sequences)
    sequences = [[*ids, 7] for ids in sequences]
    assert_plain(model, decoder.step(torch.tensor([7, 7])), sequences)

    late = prompts_of((1, 50), seed=1)
    assert_plain(model, decoder.join(late, room=30), late)
    sequences = [[*ids, number] for number, ids in enumerate(sequences + late)]
    assert_plain(model, decoder.step(torch.arange(4)), sequences)

    order = decoder.leave([0, 2])
    assert sorted(order) == [1, 3]
    sequences = [[*sequences[number], 5] for number in order]
    assert_plain(model, decoder.step(torch.tensor([5, 5])), sequences)

    assert decoder.leave([0, 1]) == []
    [prompt] = prompts_of((4,))
    assert_plain(model, decoder.join([prompt], room=8), [prompt])
    assert_plain(model, decoder.step(torch.tensor([9])), [[*prompt, 9]])


@torch.no_grad()
def test_the_buffer_grows_under_rows_in_use() -> None:
    model = tiny_policy()
    decoder = GptjDecoder(model, rows=2)
    short, long = prompts_of((5, COLUMNS_AT_ONCE + 30))
    decoder.join([short], room=8)
    decoder.join([long], room=3)
    assert_plain(model, decoder.step(torch.tensor([1, 2])), [[*short, 1], [*long, 2]])


@torch.no_grad()
def test_a_prompt_that_comes_twice_is_computed_once() -> None:
    model, tokens = tiny_policy(), []
    model.transformer.h[0].ln_1.register_forward_hook(lambda module, args, output: tokens.append(len(args[0])))
    decoder = GptjDecoder(model, rows=6)
    first, same, other = prompts_of((20, 9, 12))
    decoder.join([first], room=8)
    logits_NV = decoder.join([same, other, same, list(same)], room=8)
    assert tokens == [20, 9 + 12]
    assert torch.equal(logits_NV[0], logits_NV[2])
    sequences = [[*first, 1], [*same, 2], [*other, 3], [*same, 4], [*same, 5]]
    assert_plain(model, decoder.step(torch.tensor([1, 2, 3, 4, 5])), sequences)


@torch.no_grad()
def test_the_last_block_computes_only_what_is_read() -> None:
    model, rows = tiny_policy(), []
    for block in model.transformer.h:
        block.mlp.fc_in.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    GptjDecoder(model, rows=2).join(prompts_of((20, 9)), room=1)
    assert rows == [29, 2]


@torch.no_grad()
def test_weights_that_change_between_two_steps_count() -> None:
    model, [prompt] = tiny_policy(), prompts_of((9,))
    decoder = GptjDecoder(model, rows=1)
    decoder.join([prompt], room=4)
    model.lm_head.weight.mul_(2)
    assert_plain(model, decoder.step(torch.tensor([3])), [[*prompt, 3]])


@pytest.mark.parametrize("steps", [STEPS_WORTH_PACKING - 1, STEPS_WORTH_PACKING])
@torch.no_grad()
def test_copies_of_the_weights_give_what_the_modules_do(steps: int) -> None:
    model, prompts = tiny_policy(scale=1.0), prompts_of(LENGTHS)
    plain, fixed = GptjDecoder(model, rows=6), GptjDecoder(model, rows=6, fixed_steps=steps)
    assert_equal(fixed.join(prompts, room=3), plain.join(prompts, room=3))
    for token in (3, 5):
        assert_equal(fixed.step(torch.full((6,), token)), plain.step(torch.full((6,), token)))
    model.lm_head.weight.zero_()
    copied = not torch.equal(fixed.step(torch.zeros(6, dtype=torch.long)), model.lm_head.bias.expand(6, -1))
    assert copied == (steps == STEPS_WORTH_PACKING)


def test_what_is_more_than_a_plain_layer_is_not_copied() -> None:
    def head_of(model: PreTrainedModel) -> object:
        return linears_of(model, rows=ROWS_WORTH_PACKING, steps=STEPS_WORTH_PACKING)[1]

    model = tiny_policy()
    assert head_of(model) is not model.lm_head
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head_of(model) is model.lm_head
    hook = model.transformer.h[1].mlp.fc_out.register_forward_pre_hook(lambda module, args: None)
    assert head_of(model) is model.lm_head
    hook.remove()
    assert head_of(model) is not model.lm_head
    half, adapted, other = tiny_policy().to(torch.bfloat16), tiny_policy(), tiny_policy()
    add_adapters(adapted, LoraConfig(rank=4), key="ppo", top_layers=1, seed=0)
    other.transformer.h[0].mlp.act = torch.nn.ReLU()
    for special in (half, adapted, other):
        assert head_of(special) is special.lm_head


@torch.no_grad()
def test_a_step_may_attend_to_more_columns_than_are_filled() -> None:
    """As a recorded step does, which is the same for all lengths."""
    model, prompts = tiny_policy(scale=1.0), prompts_of(LENGTHS)
    exact, wide = GptjDecoder(model, rows=6), GptjDecoder(model, rows=6)
    exact.join(prompts, room=30)
    wide.join(prompts, room=30)
    for token in range(4):
        tokens_A = torch.full((6,), token)
        assert_equal(wide.advance(tokens_A, columns=120)[0], exact.step(tokens_A))


def test_greedy_tokens_are_those_of_transformers_own_gptj() -> None:
    model, prompts = tiny_policy(), prompts_of(LENGTHS)
    eager = GPTJForCausalLM(model.config)
    eager.load_state_dict(model.state_dict())
    ids_BP, mask_BP = left_pad(prompts, PAD_ID)
    expected_BT = eager.eval().generate(
        input_ids=ids_BP, attention_mask=mask_BP.long(), do_sample=False, max_new_tokens=20, pad_token_id=PAD_ID
    )
    for recorded in (False, True):  # without a GPU that only keeps the rows together
        engine = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID, cuda_graphs=recorded)
        actual = engine.generate(prompts, Sampling(max_new_tokens=20, temperature=0))
        assert torch.equal(actual.response_BR, expected_BT[:, ids_BP.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_near_float32(autocast: bool) -> None:
    model, prompts = tiny_policy(scale=1.0), prompts_of(LENGTHS)
    exact, rough = GptjDecoder(model, rows=6), tiny_policy(scale=1.0)
    if not autocast:
        rough = rough.to(torch.bfloat16)
    decoder = GptjDecoder(rough, rows=6)
    tokens_A = torch.arange(6)
    expected = [exact.join(prompts, room=2), exact.step(tokens_A), exact.step(tokens_A)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = [decoder.join(prompts, room=2), decoder.step(tokens_A), decoder.step(tokens_A)]
    for logits_AV, expected_AV in zip(actual, expected, strict=True):
        assert logits_AV.dtype == torch.float32
        assert not torch.equal(logits_AV, expected_AV)
        torch.testing.assert_close(logits_AV, expected_AV, atol=0.02 * float(expected_AV.abs().max()), rtol=0)


@torch.no_grad()
def test_adapters_have_their_effect() -> None:
    model, prompts = tiny_policy(), prompts_of(LENGTHS)
    plain_AV = GptjDecoder(model, rows=6).join(prompts, room=2)
    add_adapters(model, LoraConfig(rank=4), key="ppo", top_layers=1, seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.5)
    decoder = GptjDecoder(model, rows=6)
    adapted_AV = decoder.join(prompts, room=2)
    assert (adapted_AV - plain_AV).abs().max() > 1
    assert_plain(model, adapted_AV, prompts)
    assert_plain(model, decoder.step(torch.full((6,), 8)), [[*prompt, 8] for prompt in prompts])


def entering_states(model: PreTrainedModel, block: int, ids: list[int]) -> Tensor:
    """What goes into a block in one plain pass: [tokens, H]."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
    return states[block][0]


@pytest.mark.parametrize("shared", [False, True])
def test_the_trunks_states_are_kept_of_every_token_read(shared: bool) -> None:
    model, prompts = prefer_eos(tiny_policy(), 3.0), prompts_of((9, 30, 9, 1, 17, 40))
    if shared:
        prompts[4] = prompts[2] = prompts[1]
    generation = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID).generate(
        prompts, Sampling(max_new_tokens=15), generator=torch.Generator().manual_seed(1), trunk_layers=1
    )
    assert generation.trunk is not None
    lengths = generation.response_mask_BR.sum(dim=1).tolist()
    assert min(lengths) < max(lengths)  # rows leave on the way
    for number, (prompt, states) in enumerate(zip(prompts, generation.trunk, strict=True)):
        read = prompt + generation.response_BR[number, : lengths[number] - 1].tolist()
        assert states.shape == (len(read), SHAPE.hidden)
        assert_equal(states, entering_states(model, 1, read))


def test_the_trunk_of_one_token_is_the_prompts() -> None:
    model, prompts = tiny_policy(), prompts_of((4, 11))
    generation = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID).generate(
        prompts, Sampling(max_new_tokens=1), trunk_layers=1
    )
    assert [len(states) for states in generation.trunk or []] == [4, 11]


def test_no_trunk_is_kept_unasked_or_by_others() -> None:
    prompts, one = prompts_of((4, 11)), Sampling(max_new_tokens=1)
    gptj, llama = (BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID) for model in (tiny_policy(), tiny_llama()))
    assert gptj.generate(prompts, one).trunk is None
    assert gptj.generate(prompts, one, trunk_layers=0).trunk is None
    assert llama.generate(prompts, one, trunk_layers=1).trunk is None
