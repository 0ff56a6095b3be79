"""Pickled weights: their tensors are taken out, and whatever else a pickle would do is refused."""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.errors import PrerequisiteError
from rlhf.pickled import convert_pickled, is_old_buffer
from tests.fakes import tiny_gpt2, tiny_policy


def pickled(directory: Path, content: Any, *, name: str = "pytorch_model.bin") -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(content, directory / name)
    return directory


@pytest.mark.parametrize("family", [tiny_policy, tiny_gpt2])
def test_the_converted_model_is_the_same(tmp_path: Path, family: Any) -> None:
    model = family()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    weights = model.state_dict()
    names = sorted(weights)
    pickled(tmp_path / "base", {n: weights[n] for n in names[:5]} | masks, name="pytorch_model-00001-of-00002.bin")
    pickled(tmp_path / "base", {n: weights[n] for n in names[5:]}, name="pytorch_model-00002-of-00002.bin")
    target = convert_pickled(tmp_path / "base", tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in names)
    assert "transformer.h.0.attn.bias" not in load_file(target / "model.safetensors")


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled(tmp_path / "base", {"weight": torch.ones(2), "evil": Evil()})
    with pytest.raises(PrerequisiteError, match=r"pytorch_model\.bin does not hold tensors alone"):
        convert_pickled(tmp_path / "base", tmp_path / "converted")
    assert not (tmp_path / "owned").exists()
    with (tmp_path / "base" / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(PrerequisiteError, match=r"pytorch_model\.bin does not hold tensors alone"):
        convert_pickled(tmp_path / "base", tmp_path / "converted")
    assert not (tmp_path / "owned").exists()


def test_old_buffers_are_told_by_name_and_shape() -> None:
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-math.inf),
        "transformer.h.0.attn.embed_positions": torch.ones(8, 4),
    }
    assert all(is_old_buffer(name, tensor) for name, tensor in buffers.items())
    assert not is_old_buffer("transformer.h.0.attn.bias", torch.ones(8))
    assert not is_old_buffer("transformer.h.0.attn.masked_bias", torch.ones(8))
    assert not is_old_buffer("transformer.h.0.attn.embed_positions", torch.ones(8))
    assert not is_old_buffer("transformer.h.0.mlp.fc_in.bias", torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(2), "holds a Tensor instead of tensors by name"),
        ({"a": 1}, "'a' is a int instead of a tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "is torch.complex64 on cpu, which is no weight"),
        ({"a": torch.ones(1).expand(2**30)}, "claims more bytes than its file has"),
        ({"a": torch.ones(3).to_sparse()}, "which is no weight"),
        ({"a.attn.bias": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "holds no pytorch_model"),
        ({"a.attn.bias": torch.ones(3, dtype=torch.bool)}, "'a.attn.bias' is torch.bool on cpu, which is no weight"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(PrerequisiteError, match=reason):
        convert_pickled(pickled(tmp_path / "base", content), tmp_path / "converted")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "a zip of something else"])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = pickled(tmp_path / "base", {"a": torch.ones(1000)}) / "pytorch_model.bin"
    content = path.read_bytes()
    if damage == "a zip of something else":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "garbage": b"\x80\x02garbage" * 9, "empty": b""}[damage])
    with pytest.raises(PrerequisiteError, match="does not hold tensors alone, or is damaged"):
        convert_pickled(tmp_path / "base", tmp_path / "converted")
