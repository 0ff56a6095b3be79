"""Adapters on disk: peft reads what is written, it comes back bit by bit, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhf.adapter_files import load_adapter, save_adapter
from rlhf.adapters import add_adapters, fully_trained_modules, merged_weights
from rlhf.errors import PrerequisiteError
from rlhf.models import load_reward_model, reward_model_from_policy
from tests.fakes import MODELS, tiny_policy
from tests.test_adapters import LORA, TARGETS, adapted, families, logits, moved


@families
def test_peft_reads_a_saved_adapter(family: str, tmp_path: Path) -> None:
    model = adapted(family, top_layers=1)
    save_adapter(tmp_path, model, model.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    read = peft.PeftModel.from_pretrained(MODELS[family](), tmp_path)
    assert torch.equal(logits(read), logits(model))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(TARGETS[family])  # the same bytes in every process


def reward_model(folder: Path) -> PreTrainedModel:
    tiny_policy().save_pretrained(folder)
    return reward_model_from_policy(folder, seed=1)


def adapted_reward_model(folder: Path) -> PreTrainedModel:
    model = reward_model(folder)
    add_adapters(model, LORA, key="reward", seed=5, also_train=("score",))
    assert fully_trained_modules(model) == {"score"}
    return model


def test_a_reward_model_trains_its_head_and_saves_it_with_the_adapters(tmp_path: Path) -> None:
    model = moved(adapted_reward_model(tmp_path / "policy"))
    head, weights = model.score.weight.detach().clone(), model.state_dict()
    save_adapter(tmp_path / "adapter", model, weights)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    base = reward_model_from_policy(tmp_path / "policy", seed=2)
    assert not torch.equal(base.score.weight, head)
    read = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(read), logits(model))
    model.save_pretrained(tmp_path / "reward", state_dict=merged_weights(model, weights))
    published = load_reward_model(tmp_path / "reward")
    assert torch.equal(published.score.weight, head)
    torch.testing.assert_close(logits(published), logits(model), atol=1e-4, rtol=1e-5)
    again = merged_weights(model, weights, base=reward_model(tmp_path / "policy").state_dict())
    assert torch.equal(again["score.weight"], head)


def test_a_saved_adapter_goes_back_bit_by_bit(tmp_path: Path) -> None:
    model = moved(adapted_reward_model(tmp_path / "policy"))
    save_adapter(tmp_path / "adapter", model, model.state_dict())
    fresh = adapted_reward_model(tmp_path / "policy")
    before = [(parameter, parameter.data_ptr()) for parameter in fresh.parameters()]
    load_adapter(fresh, tmp_path / "adapter")
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    for parameter, (same, address) in zip(fresh.parameters(), before, strict=True):
        assert parameter is same  # an optimiser may hold it
        assert parameter.data_ptr() == address  # nothing is mapped from the file, which is removed one day


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def drop_a_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.transformer.h.1.attn.v_proj.lora_B.weight"]
    save_file(tensors, path)


def setting(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "is not a safetensors file"),
        (drop_a_tensor, "v_proj.lora_B.weight' is missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no adapter's configuration"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no adapter's configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is not a safetensors file"),
        (setting("peft_type", "IA3"), "has peft_type='IA3' where this run's configuration gives LORA"),
        (setting("r", 4), "has r=4 where this run's configuration gives 3"),
        (setting("lora_alpha", 6), "has lora_alpha=6 where this run's configuration gives 12.0"),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    model = adapted("gptj")
    save_adapter(tmp_path, model, model.state_dict())
    damage(tmp_path)
    assert problem in refusal(adapted("gptj"), tmp_path)


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted("gptj", top_layers=1)
    save_adapter(tmp_path / "top", model, model.state_dict())
    assert "h.0.attn.q_proj.lora_A.weight' is missing" in refusal(adapted("gptj"), tmp_path / "top")
    model = adapted("gptj")
    save_adapter(tmp_path / "all", model, model.state_dict())
    assert "is in no layer of this model" in refusal(adapted("gptj", top_layers=1), tmp_path / "all")
    weights = {name: tensor[:, :2] for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    save_adapter(tmp_path / "small", model, weights)
    assert "is (3, 2) in the file, (3, 32) in the model" in refusal(adapted("gptj"), tmp_path / "small")


def refusal(model: PreTrainedModel, folder: Path) -> str:
    with pytest.raises(PrerequisiteError) as caught:
        load_adapter(model, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message
