"""Our settings as trlX's, and the rewards that trlX asks for; none of this needs trlX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError, RlhfError
from rlhf.trlx.reward import RewardFunction, readable_rows, trlx_prompts, whole_chunks
from rlhf.trlx.settings import check_settings, trlx_settings
from tests.tiny_run import EOS
from tests.trlx_parts import TOKENIZER, FixedScorer, config, row


def test_our_settings_are_trlx_s(tmp_path: Path) -> None:
    settings = trlx_settings(config(kl_target=5.0), model_dir=tmp_path, work_dir=tmp_path, layers=2)
    train, method = settings["train"], settings["method"]
    assert (train["epochs"], train["total_steps"], train["eval_interval"]) == (3, 6, 4)
    assert (train["batch_size"], train["minibatch_size"], train["seq_length"]) == (2, 2, 104)
    assert (method["num_rollouts"], method["chunk_size"], method["ppo_epochs"]) == (4, 2, 1)
    assert (method["target"], method["cliprange_reward"], method["scale_reward"]) == (5.0, 10.0, None)
    assert method["gen_kwargs"]["max_new_tokens"] == 8
    assert settings["model"]["num_layers_unfrozen"] == 1
    assert settings["scheduler"] == {"name": "cosine_annealing", "kwargs": {"T_max": 6, "eta_min": 0.0}}
    assert settings["optimizer"]["kwargs"]["lr"] == 1e-3


def test_a_run_that_goes_on_trains_what_is_left_on_other_chances(tmp_path: Path) -> None:
    train = trlx_settings(config(), model_dir=tmp_path, work_dir=tmp_path, layers=2, done=1)["train"]
    assert (train["epochs"], train["total_steps"], train["seed"]) == (2, 4, 2)


def test_a_fixed_controller_a_linear_schedule_and_all_layers(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-3, "final_learning_rate": 2.5e-4, "schedule": "linear", "warmup_steps": 0}
    ours = config(kl_controller="fixed", unfrozen_layers="all", optimizer=optimizer, scale_score="running")
    settings = trlx_settings(ours, model_dir=tmp_path, work_dir=tmp_path, layers=2)
    assert settings["method"]["target"] is None
    assert settings["method"]["scale_reward"] == "running"
    assert settings["model"]["num_layers_unfrozen"] == 2
    assert settings["scheduler"] == {
        "name": "linear",
        "kwargs": {"start_factor": 1.0, "end_factor": 0.25, "total_iters": 6},
    }


@pytest.mark.parametrize(
    ("key", "ppo"),
    [
        ("ppo.value_network=separate", {"value_network": "separate"}),
        ("ppo.lora.rank=4", {"lora": {"rank": 4}}),
        ("ppo.deepspeed=zero2", {"deepspeed": "zero2"}),
        ("ppo.sampler=vllm", {"sampler": "vllm"}),
        ("ppo.reward_placement=dedicated", {"reward_placement": "dedicated"}),
        ("ppo.temperature=0.7", {"temperature": 0.7}),
        ("ppo.stop_kl=0.1", {"stop_kl": 0.1}),
        ("ppo.optimizer.warmup_steps=5", {"optimizer": {"warmup_steps": 5}}),
        ("ppo.schedule_steps=5", {"schedule_steps": 5}),
        ("learning_rate=1e-06", {"optimizer": {"learning_rate": 1e-6, "warmup_steps": 0, "final_learning_rate": 1e-5}}),
    ],
)
def test_what_trlx_has_no_counterpart_for_is_refused_by_name(key: str, ppo: dict[str, Any]) -> None:
    check_settings(config(), processes=1)
    with pytest.raises(ConfigError, match=key):
        check_settings(config(**ppo), processes=1)


def test_several_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="one process and 2"):
        check_settings(config(), processes=2)


# Prompts and rewards


def rewards(ppo: dict[str, Any], outputs: list[str]) -> list[float]:
    """Of answers to one prompt of 17 tokens."""
    function = RewardFunction([row()], ppo=config(**ppo).ppo, tokenizer=TOKENIZER, scorer=FixedScorer())
    [prompt] = trlx_prompts([row()], TOKENIZER)
    prompts = [prompt["prompt"]] * len(outputs)
    return function([], prompts, outputs, tokenizer=None, post_id=[prompt["post_id"]] * len(outputs))


@pytest.mark.parametrize(
    ("ppo", "ended", "cut"),
    [
        ({"reward": "absolute"}, 0.21, 0.20),
        ({"reward": "delta"}, 0.16, 0.15),
        ({"reward": "delta", "missing_eos_penalty": 1.0}, 0.16, -0.85),
        ({"reward": "absolute", "missing_eos_score": -1.0}, 0.21, -1.0),
    ],
)
def test_a_reward_is_the_score_of_prompt_and_response(ppo: dict[str, Any], ended: float, cut: float) -> None:
    # " a cat" has no merges: 3 bytes here, and EOS is one token.
    assert rewards(ppo, [f"cat{EOS}", "cat"]) == pytest.approx([ended, cut])


def test_an_unknown_post_and_a_prompt_that_is_not_its_own_are_errors() -> None:
    function = RewardFunction([row()], ppo=config().ppo, tokenizer=TOKENIZER, scorer=FixedScorer())
    with pytest.raises(RlhfError, match="post another, which is not"):
        function([], ["SUBREDDIT: r/pets"], ["x"], tokenizer=None, post_id=["another"])
    with pytest.raises(RlhfError, match="under another prompt"):
        function([], ["SUBREDDIT: r/cats"], ["x"], tokenizer=None, post_id=["SUBREDDIT: r/pets"])


def test_prompts_that_trlx_reads_as_other_tokens_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    spelled = row(f"what does {EOS} mean")  # as text in ours, as the token in trlX
    assert readable_rows([row(), spelled], TOKENIZER) == [row()]
    assert "1 of 2 prompts" in caplog.text
    with pytest.raises(ConfigError, match="none of 1 comes back"):
        readable_rows([spelled], TOKENIZER)


def test_prompts_fill_whole_chunks() -> None:
    rows = [row(str(number)) for number in range(5)]
    assert whole_chunks(rows, 2) == rows[:4]
    assert whole_chunks(rows[:2], 3) == [rows[0], rows[1], rows[0]]
