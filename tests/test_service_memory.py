"""What models need in memory against what is free: by hand, in made-up control groups, and measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.devices import choose_device, choose_dtype, free_bytes
from app.memory import GIB, Need, NoRoom, Workload, check_room, model_need, total_need
from rlhf import cgroups
from rlhf.errors import ConfigError, PrerequisiteError
from rlhf.weights import count_parameters, stored_tensors
from tests.conftest import REPOSITORY
from tests.fakes import tiny_llama, tiny_policy
from tests.test_cgroups import group, membership

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_free_on_the_cpu_is_the_smaller_of_machine_and_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "MEMBERSHIP", membership(tmp_path, "0::/\n"))
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "fs")
    unlimited = free_bytes(CPU)
    assert unlimited > 2**20
    group(tmp_path / "fs", version=2, limit=str(2**62), used=0)
    assert free_bytes(CPU) == pytest.approx(unlimited, rel=0.5)
    group(tmp_path / "fs", version=2, limit="5000", used=1000)
    assert free_bytes(CPU) == 4000


def test_what_torch_holds_back_on_cuda_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_bytes(GPU) == 1400


@pytest.mark.parametrize(
    ("value", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_a_device_has_one_name(value: str, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(choose_device("APP_POLICY_DEVICE", value)) == device


@pytest.mark.parametrize(
    ("value", "gpus", "reason"),
    [
        ("cuda", 0, "APP_POLICY_DEVICE=cuda is not there: visible is no CUDA device; use auto, cpu or one of these"),
        ("cuda:2", 2, "APP_POLICY_DEVICE=cuda:2 is not there: visible is cuda:0, cuda:1; use auto"),
        ("tpu", 1, "APP_POLICY_DEVICE=tpu is no device; use auto, cpu, cuda or cuda:N"),
        ("meta", 1, "APP_POLICY_DEVICE=meta is no device"),
    ],
)
def test_a_device_that_is_not_there(value: str, gpus: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError) as caught:
        choose_device("APP_POLICY_DEVICE", value)
    assert str(caught.value).startswith(reason)


def test_precision_follows_the_device_when_left_to_itself() -> None:
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("auto", GPU) is torch.bfloat16
    assert choose_dtype("float16", CPU) is torch.float16


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    model = tiny_policy()
    model.save_pretrained(tmp_path / "whole")
    # What PPO keeps beside the model is not loaded.
    save_file({"moments": torch.zeros(1000)}, tmp_path / "whole" / "optimizer.safetensors")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    expected = sum(weight.numel() for weight in model.parameters())
    assert count_parameters(stored_tensors(tmp_path / "whole")) == expected
    assert count_parameters(stored_tensors(tmp_path / "shards")) == expected


def test_attention_masks_in_old_files_are_no_parameters(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, 5), "attn.bias": torch.ones(9, dtype=torch.bool)}, tmp_path / "model.safetensors")
    assert count_parameters(stored_tensors(tmp_path)) == 15


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(
        PrerequisiteError, match=r"has no model\.safetensors; run the stage again.*: nothing is unpickled here"
    ):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"anything")
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors is not a safetensors file"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"w": "absent.safetensors"}}'])
def test_a_broken_index(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(PrerequisiteError, match="run the stage again"):
        stored_tensors(tmp_path)


def workload(sequences: int, dtype: torch.dtype = torch.float32) -> Workload:
    return Workload(device=CPU, dtype=dtype, sequences=sequences, positions=120, batch_tokens=1000)


def test_the_need_of_a_policy_by_hand() -> None:
    # 2 blocks of 2 heads of 16 numbers: keys and values of a token are 2 * 2 * 32 = 128 numbers.
    need = model_need(tiny_policy().config, 41988, workload(3))
    assert (need.weights, need.cache) == (41988 * 4, 3 * 128 * 128 * 4)  # 120 positions take a block of 128
    # 1,000 tokens: 20 * 32 numbers of the block, and a mask over 120 others at 5 bytes; 3 rows of 260 logits.
    assert need.work == 1000 * (20 * 32 * 4 + 120 * 5) + 3 * 260 * 32
    assert model_need(tiny_policy().config, 41988, workload(3, torch.bfloat16)).cache == need.cache / 2


def test_shared_key_value_heads_shrink_the_cache_and_a_reward_model_has_none() -> None:
    # 2 blocks of 2 key/value heads of 8 numbers.
    assert model_need(tiny_llama().config, 1, workload(1)).cache == 128 * 2 * 2 * 16 * 4
    reward = model_need(tiny_llama().config, 1, workload(0))
    assert reward.cache == 0
    assert reward.work == 1000 * (20 * 32 * 4 + 120 * 5)


def test_a_cpu_scores_no_more_than_its_caches_hold() -> None:
    def work(positions: int) -> int:
        task = Workload(device=CPU, dtype=torch.float32, sequences=0, positions=positions, batch_tokens=16384)
        return model_need(tiny_llama().config, 1, task).work

    assert work(120) == 1024 * (20 * 32 * 4 + 120 * 5)
    assert work(2000) == 2000 * (20 * 32 * 4 + 2000 * 5)  # a sequence that is longer goes alone


def test_a_blocks_part_of_a_cache_that_grows_is_there_twice() -> None:
    # Of 400 rows: more than reading 1,000 tokens takes.
    need = model_need(tiny_policy().config, 1, workload(400))
    assert need.work == need.cache // 2 + 400 * 260 * 32


def test_needs_add_up_by_device_and_pass_through_the_machine() -> None:
    ppo = Need(device=GPU, weights=100, cache=20, work=5)
    sft = Need(device=GPU, weights=90, cache=20, work=5)
    reward = Need(device=CPU, weights=70, cache=0, work=3)
    # The larger of the two that go to the GPU is for a moment on the CPU too.
    assert total_need([ppo, sft, reward], beside=False) == {GPU: 240, CPU: 73 + 100}
    assert total_need([ppo, sft, reward], beside=True) == {GPU: 280, CPU: 73 + 100}
    assert total_need([reward], beside=True) == {CPU: 73}


def test_just_enough_room_is_enough() -> None:
    check_room({CPU: 10, GPU: 20}, free={CPU: 10, GPU: 20}.__getitem__)


def test_too_little_room_names_both_numbers_and_the_remedy() -> None:
    free = {CPU: 100 * GIB, GPU: int(3.25 * GIB)}
    with pytest.raises(NoRoom) as caught:
        check_room({CPU: 9 * GIB, GPU: 12 * GIB}, free=free.__getitem__)
    line = str(caught.value)
    assert line.startswith("the models need 12.0 GiB on cuda:0, where 3.2 GiB are free; lower APP_SLOTS")
    assert "restart the service instead of reloading it" in line
    assert "\n" not in line
    with pytest.raises(NoRoom, match=r"9\.0 GiB on cpu, where 0\.0 GiB are free and 12\.0 GiB on cuda:0"):
        check_room({CPU: 9 * GIB, GPU: 12 * GIB}, free=lambda device: 0)


MEASURE = """
import gc, json, pathlib, resource, sys
import psutil, torch

from app.loading import load_run
from app.memory import Workload, model_need, total_need
from app.settings import Settings
from rlhf.config import TinyModelConfig
from rlhf.models import create_tiny_gptj
from rlhf.sampling import Sampling
from rlhf.slots import Request
from rlhf.weights import count_parameters, stored_tensors
from tests.fakes import EOS_ID, PAD_ID, tiny_reward_model
from tests.served_run import publish_model, served_run

def work(settings):
    # As much as can be in progress at once, which takes all the memory that the service ever takes.
    run = load_run(settings, on_phase=lambda phase: None)
    batch, sampling = run.policies["ppo"].engine.open(settings.slots), Sampling(24, min_new_tokens=24)
    for start in range(0, settings.slots, 8):
        prompts = {start + row: [(start + row + token) % 256 for token in range(96)] for row in range(8)}
        batch.add({key: Request(prompt, sampling, seed=(key,)) for key, prompt in prompts.items()})
    while batch.step():
        pass
    run.reward.scorer.score([[(row + token) % 256 for token in range(120)] for row in range(8)])
    return run, batch

torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
small = served_run(root)
work(Settings(run_dir=small, models="ppo", slots=8, max_best_of=1))
shape = TinyModelConfig(layers=4, hidden=512, heads=8, rotary_dim=32, vocab_size=5000)
policy = create_tiny_gptj(shape, positions=128, vocab_size=5000, eos_id=EOS_ID, pad_id=PAD_ID, seed=0)
publish_model(root / "large", "ppo", policy, step=1)
publish_model(root / "large", "reward", tiny_reward_model(policy), step=1)
config = policy.config
del policy
gc.collect()

slots, tokens = 48, 8 * 96
cpu = {"device": torch.device("cpu"), "dtype": torch.float32, "positions": 120, "batch_tokens": tokens}
sizes = {name: count_parameters(stored_tensors(root / "large" / name / "final")) for name in ("ppo", "reward")}
needs = [
    model_need(config, sizes[name], Workload(sequences=sequences, **cpu))
    for name, sequences in (("ppo", slots), ("reward", 0))
]
before = psutil.Process().memory_info().rss
kept = work(
    Settings(
        run_dir=root / "large", models="ppo", slots=slots, max_best_of=1,
        prefill_tokens=tokens, score_batch_tokens=tokens,
    )
)
after = psutil.Process().memory_info().rss
print(json.dumps({
    "estimate": sum(total_need(needs, beside=False).values()), "weights": sum(need.weights for need in needs),
    "cache": needs[0].cache, "stays": after - before,
}))
"""


def test_the_estimate_is_about_what_is_taken(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    measured = json.loads(answer.stdout.splitlines()[-1])
    print(measured)
    assert measured["weights"] > 100e6
    assert measured["cache"] > 80e6
    assert 0.5 < measured["stays"] / measured["estimate"] < 2
