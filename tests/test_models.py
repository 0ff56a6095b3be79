"""Models: made, loaded, refused, frozen, and taken apart without a change in what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.actor_critic import ActorCritic
from rlhf.config import TinyModelConfig
from rlhf.errors import PrerequisiteError
from rlhf.models import (
    backbone,
    blocks,
    create_tiny_gptj,
    freeze_bottom,
    load_policy,
    load_reward_model,
    position_ids,
    reward_model_from_policy,
    score_shift,
    split_backbone,
    stamp_prompt_version,
)
from rlhf.packing import Packed
from rlhf.prompt import PROMPT_VERSION
from rlhf.rollout import join

VOCABULARY, PROMPT, RESPONSE = 300, 7, 5
SHAPE = TinyModelConfig(layers=4, hidden=32, heads=4, rotary_dim=4, vocab_size=VOCABULARY)


def tiny_gptj(seed: int = 0) -> PreTrainedModel:
    return create_tiny_gptj(SHAPE, positions=64, vocab_size=VOCABULARY, eos_id=0, pad_id=1, seed=seed)


def tiny_llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=1,
        )
    ).eval()


def tiny_gpt_neox() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()


def tiny_qwen_with_sliding_top() -> PreTrainedModel:
    """Its layers differ by index: the split must keep each block's own kind of attention."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=2,
        )
    ).eval()


FAMILIES = [tiny_gptj, tiny_llama, tiny_gpt_neox, tiny_qwen_with_sliding_top]


def rows() -> tuple[Tensor, Tensor]:
    """Two rows: one with left padding, one with right padding."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(2, VOCABULARY, (2, PROMPT + RESPONSE), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    mask_BT[1, -2:] = 0
    return ids_BT.masked_fill(mask_BT == 0, 1), mask_BT


def plain_logprobs(policy: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    logits_BTV = policy(ids_BT, attention_mask=mask_BT, position_ids=position_ids(mask_BT)).logits
    logprobs_BTV = logits_BTV.log_softmax(dim=-1)[:, start - 1 : -1]
    return logprobs_BTV.gather(2, ids_BT[:, start:, None])[:, :, 0]


# --- made and loaded ---------------------------------------------------------------------------------


def test_tiny_gptj_is_the_same_for_a_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = tiny_gptj(3), tiny_gptj(3), tiny_gptj(4)
    assert torch.equal(torch.rand(1), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_tiny_gptj_is_as_asked() -> None:
    model = tiny_gptj()
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (4, 32, 4, 64)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (VOCABULARY, 0, 1)
    assert config.tie_word_embeddings is False
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_policy_survives_saving_with_dropout_off(tmp_path: Path) -> None:
    model = tiny_gptj()
    model.config.resid_pdrop = model.config.attn_pdrop = model.config.embd_pdrop = 0.1
    stamp_prompt_version(model)
    model.save_pretrained(tmp_path / "first")
    loaded = load_policy(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = load_policy(tmp_path / "second")
    ids_BT, mask_BT = rows()
    with torch.no_grad():
        assert torch.equal(
            plain_logprobs(model, ids_BT, mask_BT, PROMPT), plain_logprobs(again, ids_BT, mask_BT, PROMPT)
        )
    assert not loaded.training
    assert all(module.p == 0.0 for module in loaded.modules() if isinstance(module, nn.Dropout))
    assert (again.config.resid_pdrop, again.config.attn_pdrop, again.config.embd_pdrop) == (0.0, 0.0, 0.0)
    assert again.config.prompt_version == PROMPT_VERSION


def test_policy_loads_in_another_precision(tmp_path: Path) -> None:
    tiny_gptj().save_pretrained(tmp_path)
    assert load_policy(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_reward_model_starts_from_the_policy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policy = tiny_gptj()
    policy.save_pretrained(tmp_path)
    capfd.readouterr()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = reward_model_from_policy(tmp_path, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert capfd.readouterr().err == ""  # nothing about the head, which is new on purpose
    for name, tensor in policy.transformer.state_dict().items():
        assert torch.equal(tensor, model.transformer.state_dict()[name])
    assert model.score.weight.shape == (1, 32)
    assert torch.equal(model.score.weight, reward_model_from_policy(tmp_path, seed=1).score.weight)
    assert not torch.equal(model.score.weight, reward_model_from_policy(tmp_path, seed=2).score.weight)
    assert model.config.prompt_version == PROMPT_VERSION


def test_reward_head_has_the_deviation_of_nplus(tmp_path: Path) -> None:
    shape = TinyModelConfig(layers=1, hidden=1024, heads=4, rotary_dim=4, vocab_size=VOCABULARY)
    model = create_tiny_gptj(shape, positions=8, vocab_size=VOCABULARY, eos_id=0, pad_id=1, seed=0)
    model.save_pretrained(tmp_path)
    head = reward_model_from_policy(tmp_path, seed=1).score.weight
    assert head.std().item() == pytest.approx(1025**-0.5, rel=0.1)


def test_reward_model_survives_saving_with_its_shift(tmp_path: Path) -> None:
    tiny_gptj().save_pretrained(tmp_path / "policy")
    model = reward_model_from_policy(tmp_path / "policy", seed=1)
    assert score_shift(model) == 0.0
    model.config.score_shift = 1.25
    model.save_pretrained(tmp_path / "reward")
    loaded = load_reward_model(tmp_path / "reward")
    assert score_shift(loaded) == 1.25
    ids_BT, mask_BT = rows()
    with torch.no_grad():
        scores = [m(ids_BT, attention_mask=mask_BT).logits for m in (model, loaded)]
    assert scores[0].shape == (2, 1)
    assert torch.equal(*scores)


def test_score_shift_is_zero_where_unset() -> None:
    assert score_shift(tiny_gptj()) == 0.0


# --- refused -----------------------------------------------------------------------------------------


def refusal(load: Callable[[Path], PreTrainedModel], path: Path) -> str:
    with pytest.raises(PrerequisiteError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_language_model_is_no_reward_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_gptj().save_pretrained(tmp_path)
    capfd.readouterr()
    assert "not a reward model: weights are missing: score.weight" in refusal(load_reward_model, tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_policy(tmp_path: Path, tied: bool) -> None:
    tiny_llama(tied).save_pretrained(tmp_path / "policy")
    reward_model_from_policy(tmp_path / "policy", seed=0).save_pretrained(tmp_path / "reward")
    assert "is a reward model, not a language model" in refusal(load_policy, tmp_path / "reward")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(load_policy, tmp_path / "nowhere")
    tiny_gptj().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "not one of transformers'" in refusal(load_policy, tmp_path)


def test_weights_other_than_safetensors_are_refused(tmp_path: Path) -> None:
    model = tiny_gptj()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which can run code" in refusal(load_policy, tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    tiny_gptj().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "its tensors take 278448 bytes, and 278348 are there" in refusal(load_policy, tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = tiny_gptj()
    model.save_pretrained(tmp_path)
    model.config.vocab_size = VOCABULARY + 1
    model.config.save_pretrained(tmp_path)
    assert "transformer.wte.weight is (300, 32) in the file, (301, 32) in config.json" in refusal(load_policy, tmp_path)


def test_a_policy_without_pad_token_makes_no_reward_model(tmp_path: Path) -> None:
    model = tiny_gptj()
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    message = refusal(lambda path: reward_model_from_policy(path, seed=0), tmp_path)
    assert "names no pad_token_id" in message


# --- structure ---------------------------------------------------------------------------------------


def test_position_ids_count_real_tokens() -> None:
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask_BT).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert position_ids(mask_BT.bool()).dtype == torch.int64


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_and_blocks_are_found_by_structure(family: Callable[[], PreTrainedModel]) -> None:
    model = family()
    body = backbone(model)
    assert body is model.base_model
    assert len(blocks(body)) == 4


@pytest.mark.parametrize(
    ("fraction", "layers", "frozen"), [(0.7, 28, 20), (0.7, 4, 3), (0.0, 4, 0), (0.5, 4, 2), (1.0, 4, 4)]
)
def test_freeze_bottom(fraction: float, layers: int, frozen: int) -> None:
    shape = TinyModelConfig(layers=layers, hidden=8, heads=1, rotary_dim=2, vocab_size=VOCABULARY)
    model = create_tiny_gptj(shape, positions=8, vocab_size=VOCABULARY, eos_id=0, pad_id=1, seed=0)
    assert freeze_bottom(model, fraction) == frozen
    trained = [all(p.requires_grad for p in block.parameters()) for block in blocks(backbone(model))]
    assert trained == [False] * frozen + [True] * (layers - frozen)
    assert model.transformer.wte.weight.requires_grad is (frozen == 0)
    assert model.transformer.ln_f.weight.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_layers", [1, 3, 4])
def test_trunk_then_top_is_the_backbone(family: Callable[[], PreTrainedModel], top_layers: int) -> None:
    body = backbone(family())
    trunk, top = split_backbone(body, top_layers)
    ids_BT, mask_BT = rows()
    known = {"attention_mask": mask_BT, "position_ids": position_ids(mask_BT), "use_cache": False}
    with torch.no_grad():
        whole = body(ids_BT, **known).last_hidden_state
        middle = trunk(ids_BT, **known).last_hidden_state
        parts = top(inputs_embeds=middle, **known).last_hidden_state
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert len(blocks(body)) == 4  # the views leave it as it was


def test_views_share_the_weights() -> None:
    body = backbone(tiny_gptj())
    trunk, top = split_backbone(body, 1)
    own = {id(parameter) for parameter in body.parameters()}
    assert {id(p) for p in trunk.parameters()} | {id(p) for p in top.parameters()} == own


def test_learned_positions_cannot_be_split() -> None:
    body = backbone(
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0))
    )
    with pytest.raises(ValueError, match=r"learned absolute positions.*set ppo.unfrozen_layers: all"):
        split_backbone(body, 1)


@pytest.mark.parametrize("top_layers", [0, 5])
def test_more_layers_than_there_are_cannot_be_split_off(top_layers: int) -> None:
    with pytest.raises(ValueError, match=rf"ppo.unfrozen_layers={top_layers} is not between 1 and .* 4"):
        split_backbone(backbone(tiny_gptj()), top_layers)


# --- actor and critic --------------------------------------------------------------------------------


def inputs(actor: ActorCritic, ids_BT: Tensor, mask_BT: Tensor, prompt: int = PROMPT) -> tuple[Tensor, Packed, Tensor]:
    """What the actor takes for padded rows: trunk states, packed sequences, responses' tokens."""
    counted_BT = mask_BT.bool()
    prompts = [ids_T[:prompt][mask_T[:prompt]].tolist() for ids_T, mask_T in zip(ids_BT, counted_BT, strict=True)]
    responses = [ids_T[prompt:][mask_T[prompt:]].tolist() for ids_T, mask_T in zip(ids_BT, counted_BT, strict=True)]
    batch = join(prompts, responses, device=ids_BT.device)
    return actor.trunk_states(batch.packed), batch.packed, batch.tokens_K


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unfrozen", [2, "all"])
def test_cached_trunk_and_plain_pass_agree_with_their_gradients(
    family: Callable[[], PreTrainedModel], unfrozen: int | str
) -> None:
    policy = family()
    actor = ActorCritic(policy, unfrozen_layers=unfrozen, temperature=1.0)
    ids_BT, mask_BT = rows()
    counted_BR = mask_BT[:, PROMPT:].bool()
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]

    plain_BR = plain_logprobs(policy, ids_BT, mask_BT, PROMPT)
    plain_BR[counted_BR].sum().backward()
    gradients = {name: policy.get_parameter(name).grad.clone() for name in names}
    policy.zero_grad()
    cached_BR = actor(*inputs(actor, ids_BT, mask_BT)).logprobs_SR
    cached_BR[counted_BR].sum().backward()

    torch.testing.assert_close(cached_BR[counted_BR], plain_BR[counted_BR], atol=1e-5, rtol=1e-5)
    assert names
    for name in names:
        torch.testing.assert_close(policy.get_parameter(name).grad, gradients[name], atol=1e-5, rtol=1e-5)


def test_top_blocks_final_norm_head_and_value_head_are_trained() -> None:
    policy = tiny_gptj()
    actor = ActorCritic(policy, unfrozen_layers=2, temperature=1.0)
    prefixes = ("transformer.h.2.", "transformer.h.3.", "transformer.ln_f.", "lm_head.")
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad is name.startswith(prefixes), name
    trained = {id(parameter) for parameter in actor.trainable_parameters()}
    expected = {id(p) for p in policy.parameters() if p.requires_grad}
    assert trained == expected | {id(p) for p in actor.value_head.parameters()}


def test_weights_are_registered_once() -> None:
    actor = ActorCritic(tiny_gptj(), unfrozen_layers=2, temperature=1.0)
    pointers = [tensor.data_ptr() for tensor in actor.state_dict().values()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize("unfrozen", [2, "all"])
def test_kl_starts_at_zero_and_an_update_reaches_the_policy_but_not_the_reference(unfrozen: int | str) -> None:
    policy = tiny_gptj()
    actor = ActorCritic(policy, unfrozen_layers=unfrozen, temperature=0.7)
    ids_BT, mask_BT = rows()
    batch = inputs(actor, ids_BT, mask_BT)
    before_BR = actor(*batch).logprobs_SR
    reference_BR = actor.reference_logprobs(*batch)
    torch.testing.assert_close(before_BR, reference_BR, atol=1e-5, rtol=0)

    optimizer = torch.optim.SGD(actor.trainable_parameters(), lr=1.0)
    before_BR.sum().backward()
    optimizer.step()

    after_BR = actor(*batch).logprobs_SR
    assert (after_BR - before_BR).abs().max() > 1e-2
    counted_BR = mask_BT[:, PROMPT:].bool()
    plain_BR = plain_logprobs_at(policy, ids_BT, mask_BT, temperature=0.7)
    torch.testing.assert_close(plain_BR[counted_BR], after_BR[counted_BR], atol=1e-5, rtol=1e-5)
    assert torch.equal(actor.reference_logprobs(*batch), reference_BR)


def plain_logprobs_at(policy: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    logits_BTV = policy(ids_BT, attention_mask=mask_BT, position_ids=position_ids(mask_BT)).logits
    logprobs_BTV = (logits_BTV / temperature).log_softmax(dim=-1)[:, PROMPT - 1 : -1]
    return logprobs_BTV.gather(2, ids_BT[:, PROMPT:, None])[:, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_sequence_is_batched_with_changes_nothing(family: Callable[[], PreTrainedModel]) -> None:
    actor = ActorCritic(family(), unfrozen_layers=2, temperature=1.0)
    ids_BT, mask_BT = rows()
    with torch.no_grad():
        together = actor(*inputs(actor, ids_BT, mask_BT))
        for row in range(len(ids_BT)):
            alone = actor(*inputs(actor, ids_BT[row : row + 1], mask_BT[row : row + 1]))
            length = int(mask_BT[row, PROMPT:].sum())
            for together_BR, alone_BR in zip(together, alone, strict=True):
                assert alone_BR.shape == (1, length)
                torch.testing.assert_close(together_BR[row, :length], alone_BR[0], atol=1e-5, rtol=1e-5)
                assert not together_BR[row, length:].any()


def test_a_tied_head_is_untied_and_survives_saving(tmp_path: Path) -> None:
    policy = tiny_llama(tied=True)
    actor = ActorCritic(policy, unfrozen_layers=2, temperature=1.0)
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)
    assert not torch.equal(policy.lm_head.weight, policy.model.embed_tokens.weight)
    assert not policy.model.embed_tokens.weight.requires_grad
    assert any(parameter is policy.lm_head.weight for parameter in actor.trainable_parameters())
    policy.save_pretrained(tmp_path)
    assert torch.equal(load_policy(tmp_path).lm_head.weight, policy.lm_head.weight)


def test_everything_is_trained_and_ties_stay_when_all_layers_are() -> None:
    policy = tiny_llama(tied=True)
    freeze_bottom(policy, 1.0)
    actor = ActorCritic(policy, unfrozen_layers="all", temperature=1.0)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not any(parameter.requires_grad for parameter in actor.reference.parameters())
    ids_BT, mask_BT = rows()
    trunk_NH, packed, _ = inputs(actor, ids_BT, mask_BT)
    assert trunk_NH.shape == (len(packed.ids_N), 0)


def test_separate_value_network_reads_its_own_scores(tmp_path: Path) -> None:
    tiny_gptj(0).save_pretrained(tmp_path)
    value_model = reward_model_from_policy(tmp_path, seed=0)
    value_model.config.score_shift = 0.5
    freeze_bottom(value_model, 0.7)
    actor = ActorCritic(tiny_gptj(1), unfrozen_layers=2, temperature=1.0, value_model=value_model)
    ids_BT, mask_BT = rows()
    values_SR = actor(*inputs(actor, ids_BT, mask_BT)).values_SR
    # transformers reads a score at the last token that is not padding: the state in which the next is chosen
    for column in range(int(mask_BT[0, PROMPT:].sum())):
        prefix, mask = ids_BT[:1, : PROMPT + column], mask_BT[:1, : PROMPT + column]
        score = value_model(prefix, attention_mask=mask, position_ids=position_ids(mask)).logits[0, 0]
        torch.testing.assert_close(values_SR[0, column], score - 0.5, atol=1e-5, rtol=1e-5)
    values_SR.sum().backward()
    assert all(parameter.grad is not None for parameter in value_model.parameters())


def test_frozen_weights_in_half_precision_leave_the_trained_ones_in_float32() -> None:
    policy = tiny_llama()
    actor = ActorCritic(policy, unfrozen_layers=2, temperature=1.0, frozen_dtype=torch.bfloat16)
    assert {p.dtype for p in actor.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in actor.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert policy.model.rotary_emb.inv_freq.dtype == torch.float32
    ids_BT, mask_BT = rows()
    with torch.autocast("cpu", torch.bfloat16):
        batch = inputs(actor, ids_BT, mask_BT)
        output, reference_BR = actor(*batch), actor.reference_logprobs(*batch)
    assert batch[0].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in (*output, reference_BR)} == {torch.float32}
    torch.testing.assert_close(output.logprobs_SR, reference_BR, atol=2e-2, rtol=0)


def test_an_architecture_that_hides_work_from_the_split_is_refused() -> None:
    """BLOOM normalises its embeddings, which the top would do a second time."""
    policy = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="is not the sum of its blocks"):
        ActorCritic(policy, unfrozen_layers=1, temperature=1.0)
