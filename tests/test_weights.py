"""Weight files are judged by their headers: every way in which one can lie is refused, in one line that names it."""

from __future__ import annotations

import ast
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from rlhf.errors import PrerequisiteError
from rlhf.model_files import load_model, open_config
from rlhf.models import load_policy, load_reward_model, reward_model_from_policy
from rlhf.weights import MAX_HEADER_BYTES, count_parameters, read_header, stored_tensors, weight_files
from tests.conftest import REPOSITORY
from tests.fakes import tiny_gpt2, tiny_llama, tiny_policy

F32_PAIR = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def file_of(header: bytes | dict[str, Any], data: int = 24, *, length: int | None = None) -> bytes:
    """A safetensors file; length is the header's as the file states it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": F32_PAIR["a"] | changes}


def refused(look: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(PrerequisiteError) as caught:
        look(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert len(line) < 700
    return line


def test_a_header_tells_what_torch_wrote(tmp_path: Path) -> None:
    weights = {"x": torch.ones(2, 3), "half": torch.ones(5, dtype=torch.bfloat16), "mask": torch.ones(4).bool()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = stored_tensors(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "x": ("F32", (2, 3)),
        "half": ("BF16", (5,)),
        "mask": ("BOOL", (4,)),
    }
    assert count_parameters(stored) == 6 + 5


def test_empty_tensors_and_scalars_are_in_order(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 7), "one": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    assert count_parameters(stored_tensors(tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has 0 bytes, too few"),
        (b"1234567", "it has 7 bytes, too few"),
        (file_of(F32_PAIR, length=2**63), "too few for its header"),
        (file_of(F32_PAIR)[:40], "it has 40 bytes, too few for its header"),
        (file_of(b"{"), "no JSON at byte 1"),
        (file_of(b"\xff{}"), "no UTF-8 at byte 0"),
        (file_of(b"[]"), "it holds a list, not a JSON object"),
        (file_of(b"[" * 100_000), "nested too deeply"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' is there twice"),
        (file_of({"__metadata__": {"step": 3}}, 0), "__metadata__ holds something other than text"),
        (file_of({"a": []}), "'a' is not given by dtype, shape and data_offsets"),
        (file_of(entry(more=1)), "'a' is not given by dtype, shape and data_offsets"),
        (file_of(entry(dtype="F8_E4M3")), "'a' has the dtype 'F8_E4M3'; known are F64, F32, F16, BF16, I64"),
        (file_of(entry(dtype=["F32"])), "has the dtype ['F32']"),
        (file_of(entry(shape=[-2, -3])), "impossible shape [-2, -3]"),
        (file_of(entry(shape=[2.0, 3])), "impossible shape [2.0, 3]"),
        (file_of(entry(shape=[True, 6])), "impossible shape [True, 6]"),
        (file_of(entry(shape=[0, 2**41], data_offsets=[0, 0]), 0), "impossible shape [0, 2199023255552]"),
        (file_of(entry(shape=[1] * 17)), "impossible shape [1, 1"),
        (file_of(entry(shape="23")), "impossible shape '23'"),
        (file_of(entry(data_offsets=[24, 0])), "impossible data_offsets [24, 0]"),
        (file_of(entry(data_offsets=[-24, 0])), "impossible data_offsets [-24, 0]"),
        (file_of(entry(data_offsets=[0])), "impossible data_offsets [0]"),
        (file_of(entry(data_offsets=[0, 2**64])), "impossible data_offsets"),
        (file_of(entry(shape=[2, 4])), "'a' has 24 bytes, and its shape needs 32"),
        (file_of(entry(dtype="F64")), "'a' has 24 bytes, and its shape needs 48"),
        (file_of(F32_PAIR, 23), "its tensors take 24 bytes, and 23 are there"),
        (file_of(F32_PAIR, 25), "its tensors take 24 bytes, and 25 are there"),
        (file_of(F32_PAIR | {"b": F32_PAIR["a"]}), "'b' overlaps another tensor"),
        (file_of(entry(data_offsets=[8, 32]), 32), "'a' leaves a gap after byte 0"),
        (file_of({"x\n\ud800" * 40: 1}), r"'x\n\ud800x"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    line = refused(read_header, path)
    assert line.startswith(f"{path} is not a safetensors file: ")
    assert reason in line
    assert line.endswith("download the model again or, where a stage wrote it, run the stage again")


def test_a_header_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(b"{}", length=MAX_HEADER_BYTES + 1))
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    assert "its header has 33554433 bytes, more than 33554432" in refused(read_header, path)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A file of 1 TiB, which takes no room on the disk, is judged at once."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}}, 0))
    os.truncate(path, path.stat().st_size + 2**40)
    assert count_parameters(stored_tensors(tmp_path)) == 2**38


# --- shards --------------------------------------------------------------------------------------------


def sharded(directory: Path) -> dict[str, Any]:
    tiny_policy().save_pretrained(directory, max_shard_size="50KB")
    return json.loads((directory / "model.safetensors.index.json").read_text())


def spoil_index(directory: Path, index: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../model-00001.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "x" * 300 + ".safetensors",
     "a\0.safetensors", "\ud800.safetensors", "config.json", "absent\n.safetensors"],
)  # fmt: skip
def test_a_shard_that_is_elsewhere_or_nowhere(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    index = sharded(directory)
    (tmp_path / "model-00001.safetensors").write_bytes(file_of(F32_PAIR))
    (directory / "sub").mkdir()
    (directory / "sub" / "model.safetensors").write_bytes(file_of(F32_PAIR))
    index["weight_map"]["transformer.wte.weight"] = name
    spoil_index(directory, index)
    assert re.search("which is no safetensors file in its directory|which .* names", refused(weight_files, directory))


def test_a_link_out_of_the_directory_is_refused_but_the_hubs_cache_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    tiny_policy().save_pretrained(snapshot)
    (tmp_path / "models--x" / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "models--x" / "blobs" / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert len(stored_tensors(snapshot)) > 10
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").symlink_to(tmp_path / "models--x" / "blobs" / "abcd")
    assert "is a link that leads out of its directory" in refused(stored_tensors, elsewhere)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "no JSON at byte 1"),
        ("[]", "it holds a list"),
        ("{}", "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": ["a"]}', "it has no weight_map"),
        ('{"weight_map": {"a": 3}}', "'a' is in no file"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is there twice"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    line = refused(stored_tensors, tmp_path)
    assert "is no index of weights" in line
    assert reason in line


def test_an_index_that_does_not_go_with_its_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    first = min(index["weight_map"].values())
    spoil_index(tmp_path, index | {"weight_map": index["weight_map"] | {"stranger": first}})
    assert f"lacks 'stranger', which {'model.safetensors.index.json'} places there" in refused(stored_tensors, tmp_path)
    (tmp_path / "model-more.safetensors").write_bytes((tmp_path / first).read_bytes())
    spoil_index(tmp_path, index | {"weight_map": index["weight_map"] | {"stranger": "model-more.safetensors"}})
    assert "which another shard holds too" in refused(stored_tensors, tmp_path)


def test_pickles_alone_are_refused_and_the_remedy_named(tmp_path: Path) -> None:
    model = tiny_policy()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    line = refused(load_policy, tmp_path)
    assert "pytorch_model.bin is a pickle, which can run code; where it is to be the base model, set model.pick" in line


# --- config.json against the weights ---------------------------------------------------------------------


def tiny_mixtral() -> PreTrainedModel:
    """Its files hold each expert apart, its modules hold them in one tensor."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (tiny_llama, {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, and the files beside it hold 21"),
        (tiny_policy, {"n_layer": 10**9}, "n_layer=1000000000, and the files beside it hold"),
        (tiny_llama, {"vocab_size": 10**9}, "a model of 32000000000 numbers or more, and"),
        (tiny_llama, {"intermediate_size": 10**10}, "numbers or more"),
        (tiny_llama, {"hidden_size": 10**12}, "config.json"),
        (tiny_llama, {"hidden_size": 10**30}, "config.json"),
        (tiny_llama, {"hidden_size": -32}, "config.json"),
        (tiny_policy, {"n_positions": 10**9}, "numbers or more"),
        (tiny_gpt2, {"n_positions": 10**8}, "numbers or more"),
        (tiny_mixtral, {"num_local_experts": 10**9}, "numbers or more"),
        (tiny_llama, {"num_labels": 10**9}, "num_labels=1000000000 is more than 100000"),
        (tiny_llama, {"intermediate_size": 65}, "gate_proj.weight is (64, 32) in the file, (65, 32) in config.json"),
        (tiny_llama, {"hidden_size": "wide"}, "config.json"),
        (tiny_llama, {"num_attention_heads": 0}, "config.json"),
        (tiny_llama, {"dtype": "float1"}, "config.json"),
        (tiny_llama, {"model_type": "vit"}, "config.json"),
        (tiny_llama, {"model_type": ["llama"]}, "config.json"),
        (tiny_llama, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
        (tiny_llama, {"transformers_weights": "../other.safetensors"}, "transformers_weights is set"),
        (tiny_llama, {"attn_implementation": "someone/kernel"}, "'someone/kernel' is code from the Hub"),
        (tiny_llama, {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}, "custom code"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_go_with_its_weights(
    tmp_path: Path, family: Callable[[], PreTrainedModel], changes: dict[str, Any], reason: str
) -> None:
    family().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert reason in refused(load_policy, tmp_path)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert "holds an adapter" in refused(load_policy, tmp_path)


@pytest.mark.parametrize("family", [tiny_policy, tiny_llama, tiny_gpt2, tiny_mixtral])
def test_good_models_pass(tmp_path: Path, family: Callable[[], PreTrainedModel]) -> None:
    model = family()
    model.save_pretrained(tmp_path)
    config, stored = open_config(tmp_path)
    loaded, missing, unused = load_model(AutoModelForCausalLM, tmp_path, config, stored, "auto")
    assert (missing, unused) == (set(), set())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- what is loaded is ours --------------------------------------------------------------------------------

CUT_WHILE_IN_USE = """
import sys
from rlhf import models
for loader, name in (("load_policy", "policy"), ("load_reward_model", "reward")):
    model = getattr(models, loader)(f"{sys.argv[1]}/{name}")
    open(f"{sys.argv[1]}/{name}/model.safetensors", "r+b").truncate(0)
    model.save_pretrained(f"{sys.argv[1]}/{name}-copy")
"""


def test_a_file_that_is_cut_later_takes_nothing_away(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "policy")
    reward = reward_model_from_policy(tmp_path / "policy", seed=0)
    reward.save_pretrained(tmp_path / "reward")
    done = subprocess.run(
        [sys.executable, "-c", CUT_WHILE_IN_USE, str(tmp_path)],
        cwd=REPOSITORY, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # SIGBUS would be -7
    for name, load, model in (("policy", load_policy, policy), ("reward", load_reward_model, reward)):
        loaded = load(tmp_path / f"{name}-copy").state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


# --- the code ------------------------------------------------------------------------------------------------

TRUSTED = ("from_pretrained", "from_config")
UNPICKLERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "torch.jit.load", "numpy.load", "np.load",
    "pd.read_pickle", "pandas.read_pickle", "marshal.loads", "dill.load", "dill.loads",
}  # fmt: skip


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def sources() -> list[Path]:
    return sorted(path for package in ("rlhf", "app") for path in (REPOSITORY / package).rglob("*.py"))


def test_no_code_of_a_model_is_ever_trusted() -> None:
    seen = 0
    for path in sources():
        for call in calls(path):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            if isinstance(call.func, ast.Attribute) and call.func.attr in TRUSTED:
                seen += 1
                assert "trust_remote_code" in keywords, f"{path}:{call.lineno} does not say trust_remote_code=False"
            if (value := keywords.get("trust_remote_code")) is not None:
                assert isinstance(value, ast.Constant), f"{path}:{call.lineno}"
                assert value.value is False, f"{path}:{call.lineno}"
    assert seen >= 3


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_nothing_is_unpickled_by_our_code(path: Path) -> None:
    for call in calls(path):
        name = ast.unparse(call.func)
        if name == "torch.load":  # of tensors alone, which torch itself makes sure of
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("weights_only") == "True", f"{path}:{call.lineno}"
        else:
            assert name not in UNPICKLERS, f"{path}:{call.lineno}"
