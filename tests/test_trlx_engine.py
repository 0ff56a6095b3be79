"""PPO by trlX itself, which is skipped where it is not installed, and the mends, which need no trlX.

trlX goes into an environment of its own, for the sake of what it brings:

    python3 -m venv .venv-trlx && . .venv-trlx/bin/activate
    pip install torch==2.13.0  # a CPU build
    pip install -r requirements/lock.txt
    pip install 'trlx @ git+https://github.com/CarperAI/trlx@3340c2f3a56d1d14fdd5f13ad575121fa26b6d92'
    OMP_NUM_THREADS=1 python -m pytest tests/test_trlx_engine.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.checkpoint import StageDir
from rlhf.data import load_examples
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.errors import ConfigError, RlhfError, StopRequested
from rlhf.models import backbone, position_ids, reward_model_from_policy
from rlhf.prompt import Post, encode_prompt
from rlhf.telemetry import read_metrics
from rlhf.trlx import compat
from rlhf.trlx.train import run
from tests.fakes import tiny_gpt2, tiny_llama, tiny_policy
from tests.tiny_run import fetched_run
from tests.training_runs import StopAtLook
from tests.trlx_parts import TOKENIZER, config

needs_trlx = pytest.mark.skipif(
    importlib.util.find_spec("trlx") is None, reason="trlX is not installed; this file begins with how to get it"
)


@pytest.mark.parametrize(("package", "version"), [("trlx", "0.6.0"), ("transformers", "5.20.0"), ("peft", "0.3.0")])
def test_versions_that_were_not_checked_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    good = {name: checked[0] for name, checked in compat.CHECKED.items()}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: (good | {package: version})[name])
    monkeypatch.setattr(compat, "_installed_commit", lambda: compat.COMMIT)
    with pytest.raises(ConfigError, match=f"{package} {good[package]}.*{version} is installed"):
        compat.check_versions()
    monkeypatch.setattr(importlib.metadata, "version", good.__getitem__)
    compat.check_versions()
    monkeypatch.setattr(compat, "_installed_commit", lambda: "0123456789")
    with pytest.raises(ConfigError, match="3340c2f, and 0123456 is installed"):
        compat.check_versions()


def test_without_trlx_the_stage_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match=r"trlx is not installed; docs/trlx\.md"):
        run(config(), StageDir(tmp_path, "ppo"), StopAtLook(10**6))


@pytest.mark.parametrize("make", [tiny_policy, tiny_gpt2])
def test_the_reference_branch_is_the_model_on_padded_rows(make: Any) -> None:
    policy = make(seed=1).eval()
    policy.config._attn_implementation = "eager"
    ids_BT = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones(2, 9, dtype=torch.bool)
    mask_BT[1, :4] = False
    inputs = {"attention_mask": mask_BT.long(), "position_ids": position_ids(mask_BT)}
    body = backbone(policy)
    with torch.no_grad():
        output = policy(ids_BT, output_hidden_states=True, **inputs)
        branch = SimpleNamespace(
            config=policy.config, decoder_blocks=body.h[1:], final_norm=body.ln_f, lm_head=policy.lm_head
        )
        hidden = output.hidden_states[1]
        logits = compat.reference_forward(branch, hidden, hidden.shape, return_dict=False, **inputs)[0]
    torch.testing.assert_close(logits[mask_BT], output.logits[mask_BT], atol=1e-4, rtol=1e-5)


def test_a_replacement_is_undone() -> None:
    thing = SimpleNamespace(there=1)
    with compat.replaced(thing, "there", 2), compat.replaced(thing, "new", 3):
        assert (thing.there, thing.new) == (2, 3)
    assert vars(thing) == {"there": 1}


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run that has all that PPO needs: the base model stands for SFT, a fresh head for the reward model."""
    run_dir = fetched_run(tmp_path)
    fetched = StageDir(run_dir, "fetch").final()
    with StageDir(run_dir, "sft").publish(1, final=True) as directory:
        shutil.copytree(fetched / "base", directory, dirs_exist_ok=True)
    with StageDir(run_dir, "reward").publish(1, final=True) as directory:
        reward_model_from_policy(run_dir / "sft" / "final", seed=5).save_pretrained(directory)
        TOKENIZER.save_pretrained(directory)
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        for split in ("train", "valid"):
            posts = [example.post for example in load_examples(fetched / "data", split)]
            write_environment(directory, split, (prepared(post) for post in posts))
    yield run_dir
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(post: Post) -> EnvironmentRow:
    return EnvironmentRow(post.id, encode_prompt(TOKENIZER, post, max_tokens=96).ids, 0, 0.25)


def weights(directory: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


@needs_trlx
@pytest.mark.filterwarnings("ignore")  # trlX is of 2023: its libraries deprecate half of what it calls
def test_trlx_trains_what_it_is_told_to(run_dir: Path) -> None:
    run(config(), StageDir(run_dir, "ppo"), StopAtLook(10**6))
    rows = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    assert [line["step"] for line in rows] == [0, 1, 2, 3]
    assert rows[0]["ppo/eval_kl"] == pytest.approx(0, abs=1e-4)
    assert rows[1]["ppo/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[3]["ppo/kl"] > 0
    assert {"ppo/eval_reward", "ppo/eval_response_tokens"} <= rows[2].keys()
    # The first rate is that after one step of a cosine of six: (1 + cos(pi / 6)) / 2, and after two: of pi / 3.
    assert rows[1]["ppo/learning_rate"] == pytest.approx(1e-3 * (0.9330127 + 0.75) / 2, rel=1e-5)
    before, after = weights(run_dir / "sft" / "final"), weights(run_dir / "ppo" / "final")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("transformer.h.1.", "transformer.ln_f.", "lm_head."))}


@needs_trlx
@pytest.mark.filterwarnings("ignore")
def test_trlx_is_stopped_anywhere_and_goes_on(run_dir: Path) -> None:
    stage, stops = StageDir(run_dir, "ppo"), 0
    while not stage.is_final():
        try:
            run(config(eval_posts=2), stage, StopAtLook(7))
        except StopRequested:
            stops += 1
        AcceleratorState._reset_state(reset_partial_state=True)
        assert stops < 10
    assert stops >= 1
    assert [line["step"] for line in read_metrics(stage.path / "metrics.jsonl")] == [0, 1, 2, 3]


@needs_trlx
@pytest.mark.filterwarnings("ignore")
def test_a_reference_that_sees_the_tokens_to_come_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The policy's own module has the function by name already; only the mended branch asks for it here.
    monkeypatch.setattr("transformers.masking_utils.create_causal_mask", lambda **inputs: None)
    with pytest.raises(RlhfError, match="reference is not the SFT policy"):
        run(config(), StageDir(run_dir, "ppo"), StopAtLook(10**6))


@needs_trlx
def test_a_model_whose_reference_is_not_mended_is_refused(run_dir: Path) -> None:
    with StageDir(run_dir, "sft").publish(2, final=True) as directory:
        tiny_llama().save_pretrained(directory)
        TOKENIZER.save_pretrained(directory)
    with pytest.raises(ConfigError, match="sft/final is LlamaForCausalLM"):
        run(config(), StageDir(run_dir, "ppo"), StopAtLook(10**6))
