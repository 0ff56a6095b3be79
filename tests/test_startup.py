"""Start-up: nothing needless is imported, weights are read once and hashed on the way, and the benchmark runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import rlhf.weight_reading
from app.loading import _is_finite
from app.published import describe, verify_files, verify_weights
from app.read_ahead import read_ahead
from rlhf.checkpoint import StageDir
from rlhf.errors import PrerequisiteError, StorageError
from rlhf.model_files import file_digests, load_model, open_config
from rlhf.weight_reading import read_weights
from rlhf.weights import StoredTensor, stored_tensors, weight_files
from tests.benchmarks import startup
from tests.conftest import REPOSITORY
from tests.fakes import tiny_gpt2, tiny_llama, tiny_policy, tiny_reward_model
from tests.served_run import served_run

# What training, evaluation and reports need, and what pulls much along with it.
NOT_SERVED = {
    "datasets", "deepspeed", "evaluate", "httpx", "matplotlib", "nltk", "pandas", "peft", "pyarrow", "pytest",
    "rouge_score", "scipy", "sklearn", "tensorboard", "tensorflow", "torchaudio", "torchvision", "trlx", "vllm",
}  # fmt: skip
TRAINING = {"rlhf.actor_critic", "rlhf.collate", "rlhf.losses", "rlhf.ppo_state", "rlhf.stages", "rlhf.training"}

SERVE = """
import sys
import app.logs, app.main, app.server, app.service
from pathlib import Path
from app.loading import load_run
from app.settings import Settings
load_run(Settings(run_dir=Path(sys.argv[1]), threads=1), on_phase=lambda phase: None)
print(*sys.modules)
"""


def modules_after(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh process has imported when the code has run; it prints them."""
    command = [sys.executable, "-c", code, *arguments]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(answer.stdout.splitlines()[-1].split())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_help_imports_nothing_but_the_standard_library_and_us() -> None:
    code = (
        "import contextlib, sys\nfrom rlhf.__main__ import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\nprint(*sys.modules)"
    )
    bare = modules_after(
        "import sys; print(*sys.modules)"
    )  # what the interpreter itself brings, an editable install too
    strangers = packages(modules_after(code) - bare) - set(sys.stdlib_module_names)
    assert strangers == {"rlhf"}


def test_the_service_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    modules = modules_after(SERVE, str(served_run(tmp_path)))
    assert {"torch", "transformers", "app", "rlhf"} <= packages(modules)
    assert packages(modules) & NOT_SERVED == set()
    assert modules & TRAINING == set()


def saved(model: PreTrainedModel, directory: Path, **options: str) -> Path:
    model.save_pretrained(directory, **options)
    return directory


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny_policy, AutoModelForCausalLM),
        (tiny_reward_model, AutoModelForSequenceClassification),
        (tiny_gpt2, AutoModelForCausalLM),
        (tiny_llama, AutoModelForCausalLM),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_a_model_is_loaded_as_transformers_loads_it(
    make: Callable[[], PreTrainedModel], kind: type, dtype: torch.dtype | str, tmp_path: Path
) -> None:
    """Bit for bit, in shards too, with everything that is told of it."""
    directory = saved(make(), tmp_path / "model", max_shard_size="40KB")
    assert len(weight_files(directory)) > 1
    config, stored = open_config(directory)
    ours, missing, unused = load_model(kind, directory, config, stored, dtype)
    theirs = kind.from_pretrained(directory, config=config, dtype=dtype, attn_implementation="eager")
    assert (missing, unused) == (set(), set())
    for mine, other in ((ours.state_dict(), theirs.state_dict()), *[[dict(m.named_buffers()) for m in (ours, theirs)]]):
        assert list(mine) == list(other)
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name])
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert (ours.name_or_path, ours.config.name_or_path) == (theirs.name_or_path, theirs.config.name_or_path)
    assert (ours.training, type(ours)) == (theirs.training, type(theirs))
    if ours.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_how_a_model_generates_comes_from_its_own_file(tmp_path: Path) -> None:
    directory = saved(tiny_policy(), tmp_path / "model")
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 17}))
    model, _, _ = load_model(AutoModelForCausalLM, directory, *open_config(directory), torch.float32)
    assert model.generation_config.max_new_tokens == 17
    path.unlink()
    model, _, _ = load_model(AutoModelForCausalLM, directory, *open_config(directory), torch.float32)
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_files_are_hashed_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.weight_reading, "PIECE_BYTES", 1000)  # many pieces a tensor, more than may be pending
    directory = saved(tiny_policy(), tmp_path / "model", max_shard_size="80KB")
    model, _, _ = load_model(AutoModelForCausalLM, directory, *open_config(directory), torch.bfloat16)
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weight_files(directory)}
    assert len(expected) > 1
    assert file_digests(model) == expected


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([[True, False]]),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "counts": torch.arange(7, dtype=torch.int16),
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    as_stored = read_weights(tmp_path, stored).tensors
    narrow = read_weights(tmp_path, stored, dtype=torch.bfloat16).tensors
    assert as_stored.keys() == narrow.keys() == tensors.keys()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert as_stored[name].dtype == tensor.dtype
        assert torch.equal(as_stored[name], tensor)
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert narrow[name].dtype == expected.dtype
        assert torch.equal(narrow[name], expected)


def test_weights_that_change_between_judging_and_reading_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    judged = stored_tensors(tmp_path)
    save_file({"w": torch.zeros(4), "v": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(PrerequisiteError, match="its weights have changed while they were loaded"):
        read_weights(tmp_path, judged)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file would end the process."""
    save_file({"w": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    judged = stored_tensors(tmp_path)
    read_start = rlhf.weight_reading.read_start

    def cut_behind_the_header(file: BinaryIO) -> tuple[bytes, dict[str, StoredTensor]]:
        start = read_start(file)
        os.truncate(tmp_path / "model.safetensors", 1000)
        return start

    monkeypatch.setattr(rlhf.weight_reading, "read_start", cut_behind_the_header)
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors cannot be read: it has become shorter"):
        read_weights(tmp_path, judged)


def test_a_volume_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")

    def fail(file: BinaryIO) -> tuple[bytes, dict[str, StoredTensor]]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rlhf.weight_reading, "read_start", fail)
    with pytest.raises(StorageError, match="input/output error: check the volume"):
        read_weights(tmp_path, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none_is_found(bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.linspace(-3, 3, 5000, dtype=torch.float32).to(dtype)
        assert _is_finite(weight)
        for place in (0, 1234, -1):
            changed = weight.clone()
            changed[place] = bad
            assert not _is_finite(changed)
    assert _is_finite(torch.zeros(0))


def test_reading_ahead_reads_all_and_leaves_what_is_wrong_to_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = served_run(tmp_path)
    shutil.rmtree(run_dir / "sft")
    opened: list[str] = []
    open_file = Path.open

    def watched(path: Path, *arguments: object, **options: object) -> object:
        opened.append(path.parent.parent.name)
        return open_file(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", watched)
    thread = read_ahead(run_dir, ("ppo", "sft", "reward"))
    thread.join(10)
    assert not thread.is_alive()
    assert opened == ["ppo", "reward"]
    assert thread.daemon  # it holds up no stop


def test_what_only_training_reads_is_held_against_its_size_alone(tmp_path: Path) -> None:
    """Moments can be larger than the weights, and no answer depends on them."""
    run_dir = served_run(tmp_path)
    with StageDir(run_dir, "ppo").publish(9, final=True) as directory:
        shutil.copytree(run_dir / "sft" / "final", directory, dirs_exist_ok=True)
        (directory / "optimizer.safetensors").write_bytes(bytes(1000))
    moments = run_dir / "ppo" / "final" / "optimizer.safetensors"
    model = describe("ppo", moments.parent, run="served")
    moments.write_bytes(b"!" * 1000)
    verify_files(model, weights=True)
    moments.write_bytes(b"!" * 999)
    with pytest.raises(PrerequisiteError, match=r"optimizer\.safetensors has 999 bytes instead of 1000"):
        verify_files(model, weights=True)


@pytest.mark.parametrize("weights", [False, True])
def test_weights_that_another_loads_are_read_before(weights: bool, tmp_path: Path) -> None:
    """vLLM reads them by itself; those that we load are hashed on the way, and held against the same list."""
    path = served_run(tmp_path) / "ppo" / "final" / "model.safetensors"
    model = describe("ppo", path.parent, run="served")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = r"model\.safetensors has changed since it was written \(sha256 differs\); move "
    if weights:
        with pytest.raises(PrerequisiteError, match=line):
            verify_files(model, weights=True)
    else:
        verify_files(model, weights=False)
        with pytest.raises(PrerequisiteError, match=line):
            verify_weights(model, {path.name: hashlib.sha256(data).hexdigest()})
        with pytest.raises(PrerequisiteError, match="stranger"):
            verify_weights(model, {"stranger.safetensors": model.files[path.name]["sha256"]})


def test_the_benchmark_measures_everything(tmp_path: Path) -> None:
    found = startup.measure(tmp_path, layers=1, hidden=32, caches=("warm",))
    assert found.weight_bytes > 2 * 4 * 12 * 32**2
    assert 0 < found.help.wall_seconds < found.ready["warm"].wall_seconds
    assert found.ratio("warm") == found.ready["warm"].wall_seconds / found.reading["warm"].wall_seconds
    assert json.loads(found.to_json())["ratio"].keys() == {"warm"}
    assert len(startup.told(found).splitlines()) == 3
    assert startup.layers_for(2000, 1536) == 18  # 2,000 MB at 12 * 1,536² numbers of 4 bytes a block
