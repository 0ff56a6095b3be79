"""What a user hears when vLLM is not there, is broken, or is made for another device; none of this needs vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.errors import ConfigError, PrerequisiteError
from rlhf.vllm_engine import VllmEngine
from rlhf.vllm_process import import_vllm
from tests.conftest import REPOSITORY
from tests.fakes import EOS_ID, PAD_ID


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package of vLLM's name that says it runs on GPUs; the tests change it before it is imported."""
    package = tmp_path / "vllm"
    package.mkdir()
    for name in ("__init__", "inputs", "sampling_params"):
        (package / f"{name}.py").write_text("")
    (package / "platforms.py").write_text("class current_platform:\n    device_type = 'cuda'\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def test_importing_the_engine_does_not_import_vllm() -> None:
    code = "import sys, rlhf.vllm_engine; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_without_vllm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed; install it: pip install '\.\[vllm\]'"):
        VllmEngine(tmp_path, eos_id=EOS_ID, pad_id=PAD_ID, slots=2, device="cpu", dtype=torch.float32)


def test_a_vllm_that_lacks_something_says_what(fake_vllm: Path) -> None:
    (fake_vllm / "inputs.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"cannot be imported \(No module named 'nothing_of_this_name'\)"):
        import_vllm(torch.device("cuda"))


def test_a_vllm_for_another_device(fake_vllm: Path) -> None:
    with pytest.raises(ConfigError, match="asked for on cpu, but the vLLM that is installed runs on cuda; choose"):
        import_vllm(torch.device("cpu"))
    assert import_vllm(torch.device("cuda:1")).__name__ == "vllm"


def test_a_vllm_that_finds_no_device(fake_vllm: Path) -> None:
    (fake_vllm / "platforms.py").write_text("class current_platform:\n    device_type = ''\n")
    with pytest.raises(ConfigError, match="runs on no device of this machine"):
        import_vllm(torch.device("cuda"))


def test_the_environment_keeps_only_what_is_vllms_own(fake_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "1")
    (fake_vllm / "__init__.py").write_text(
        "import os\nos.environ.update(LD_PRELOAD='x', CHANGED='after', VLLM_ITS_OWN='y')\ndel os.environ['KEPT']\n"
    )
    before = dict(os.environ)
    import_vllm(torch.device("cuda"))
    after = dict(os.environ)
    try:
        assert {name: value for name, value in after.items() if not name.startswith("VLLM_")} == {
            name: value for name, value in before.items() if not name.startswith("VLLM_")
        }
        assert after["VLLM_ITS_OWN"] == "y"
        assert after["VLLM_CONFIGURE_LOGGING"] == "0"
    finally:
        for name in [name for name in after if name.startswith("VLLM_") and name not in before]:
            del os.environ[name]


def test_a_directory_without_a_model(fake_vllm: Path, tmp_path: Path) -> None:
    (fake_vllm / "platforms.py").write_text("class current_platform:\n    device_type = 'cpu'\n")
    with pytest.raises(PrerequisiteError, match=r"config\.json is missing"):
        VllmEngine(tmp_path, eos_id=EOS_ID, pad_id=PAD_ID, slots=2, device="cpu", dtype=torch.float32)
