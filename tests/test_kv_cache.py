"""The decoder: rows give the logits of a plain pass, whoever joins or leaves beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from rlhf.kv_cache import COLUMNS_AT_ONCE, Decoder
from tests.fakes import MODELS, PAD_ID, tiny_policy


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The next token's, by one pass without padding or cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def assert_plain(model: PreTrainedModel, logits_AV: Tensor, sequences: list[list[int]]) -> None:
    for logits_V, ids in zip(logits_AV, sequences, strict=True):
        torch.testing.assert_close(logits_V, plain_logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_rows_join_and_leave_without_changing_the_others(kind: str) -> None:
    model = MODELS[kind]()
    decoder = Decoder(model, rows=4, pad_id=PAD_ID)
    sequences = prompts_of(9, 30)
    assert_plain(model, decoder.join(sequences, room=70), sequences)

    sequences = [[*ids, 7] for ids in sequences]
    assert_plain(model, decoder.step(torch.tensor([7, 7])), sequences)

    late = prompts_of(1, 50)
    assert_plain(model, decoder.join(late, room=30), late)
    sequences = [[*ids, number] for number, ids in enumerate(sequences + late)]
    assert_plain(model, decoder.step(torch.arange(4)), sequences)

    order = decoder.leave([0, 2])
    assert sorted(order) == [1, 3]
    assert len(decoder) == 2
    sequences = [[*sequences[number], 5] for number in order]
    assert_plain(model, decoder.step(torch.tensor([5, 5])), sequences)


@torch.no_grad()
def test_buffers_grow_under_rows_in_use() -> None:
    model = tiny_policy()
    decoder = Decoder(model, rows=2, pad_id=PAD_ID)
    short, long = prompts_of(5, COLUMNS_AT_ONCE + 30)
    decoder.join([short], room=COLUMNS_AT_ONCE)
    decoder.join([long], room=3)
    assert_plain(model, decoder.step(torch.tensor([1, 2])), [[*short, 1], [*long, 2]])


@torch.no_grad()
def test_a_prompt_that_comes_twice_is_computed_once() -> None:
    model, rows = tiny_policy(), []
    model.transformer.h[0].register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    decoder = Decoder(model, rows=5, pad_id=PAD_ID)
    same, other = prompts_of(9, 12)
    logits_NV = decoder.join([same, other, same, list(same)], room=8)
    assert rows == [2]
    assert torch.equal(logits_NV[0], logits_NV[2])
    sequences = [[*same, 1], [*other, 2], [*same, 3], [*same, 4]]
    assert_plain(model, decoder.step(torch.tensor([1, 2, 3, 4])), sequences)


@torch.no_grad()
def test_everybody_leaves_and_others_come() -> None:
    model = tiny_policy()
    decoder = Decoder(model, rows=2, pad_id=PAD_ID)
    decoder.join(prompts_of(30, 31), room=8)
    assert decoder.leave([0, 1]) == []
    [prompt] = prompts_of(4)
    assert_plain(model, decoder.join([prompt], room=8), [prompt])
    assert_plain(model, decoder.step(torch.tensor([9])), [[*prompt, 9]])


@torch.no_grad()
def test_what_an_attention_window_would_hide_is_refused() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    decoder = Decoder(model, rows=1, pad_id=0)
    with pytest.raises(ValueError, match="20 tokens are more than the attention's window of 16"):
        decoder.join([list(range(12))], room=8)
    assert_plain(model, decoder.join([list(range(12))], room=4), [list(range(12))])
