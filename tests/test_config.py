"""Settings: presets load, mistakes are named, the page of settings is current."""

import re
from pathlib import Path

import pytest
import yaml

from rlhf.config import Config, fields
from rlhf.config_reference import settings_markdown
from rlhf.errors import ConfigError
from rlhf.presets import load_config, preset_names
from tests.conftest import REPOSITORY


def test_presets_are_the_documented_ones() -> None:
    assert preset_names() == ["demo", "gptj-6b", "gptj-6b-nplus"]


@pytest.mark.parametrize("name", ["demo", "gptj-6b", "gptj-6b-nplus"])
def test_a_preset_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "copy.yaml")) == config


def test_gptj_6b_has_the_originals_hyper_parameters() -> None:
    """As listed for trlX's summarize example, bf16 where fp16 was used."""
    config = load_config("gptj-6b")
    assert config.prompt.max_sequence_tokens == 550
    assert config.prompt.max_response_tokens == 50
    assert (config.ppo.rollouts_per_iteration, config.ppo.rollout_chunk, config.ppo.inner_epochs) == (128, 16, 4)
    assert (config.ppo.unfrozen_layers, config.ppo.minibatch_size) == (8, 4)
    assert (config.ppo.init_kl_coef, config.ppo.kl_target, config.ppo.kl_horizon) == (0.1, 6, 10_000)
    assert (config.ppo.gamma, config.ppo.lam, config.ppo.vf_coef) == (1, 0.95, 0.2)
    assert (config.ppo.clip_ratio, config.ppo.clip_value, config.ppo.clip_score) == (0.2, 0.2, 10)
    adam = config.ppo.optimizer
    assert (adam.learning_rate, adam.final_learning_rate, adam.betas) == (5e-6, 5e-6, (0.9, 0.999))
    assert (adam.eps, adam.weight_decay, adam.schedule) == (1e-8, 0.01, "cosine")
    assert config.ppo.schedule_steps == 100_000 <= config.ppo.total_optimizer_steps < 100_128
    assert config.ppo.eval_posts == 1000
    assert config.ppo.stop_kl is None
    assert config.reward.frozen_fraction == 0.7
    assert config.runtime.precision == "bfloat16"
    assert (config.sft.epochs, config.sft.optimizer.learning_rate, config.sft.optimizer.betas) == (5, 1e-5, (0.9, 0.95))


def test_nplus_has_the_studys_settings() -> None:
    ppo = load_config("gptj-6b-nplus").ppo
    assert ppo.iterations == 1_000_000 // 512
    assert (ppo.unfrozen_layers, ppo.value_network, ppo.temperature) == ("all", "separate", 0.7)
    assert (ppo.kl_controller, ppo.init_kl_coef, ppo.vf_coef) == ("fixed", 0.05, 0.1)
    assert (ppo.optimizer.learning_rate, ppo.optimizer.eps) == (3e-6, 1e-5)
    assert (ppo.reward, ppo.missing_eos_score) == ("absolute", -1)
    assert load_config("gptj-6b-nplus").prompt.max_response_tokens == 53


def test_overrides_change_single_keys() -> None:
    config = load_config("demo", ["seed=7", "ppo.stop_kl=0.5", "ppo.unfrozen_layers=all", "sft.optimizer.eps=1e-6"])
    assert (config.seed, config.ppo.stop_kl, config.ppo.unfrozen_layers) == (7, 0.5, "all")
    assert config.sft.optimizer.eps == 1e-6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.learning_rat=1", r"unknown key ppo\.learning_rat; did you mean ppo\."),
        ("ppo.iteratons=3", r"unknown key ppo\.iteratons; did you mean ppo\.iterations\?"),
        ("sfft.epochs=1", r"unknown key sfft.*did you mean sft"),
        ("ppo.gamma=high", r"ppo\.gamma='high': Input should be a valid number"),
        ("ppo.gamma=1.5", r"ppo\.gamma=1\.5: .*less than or equal to 1"),
        ("ppo.minibatch_size=3", r"ppo: .*is not a multiple of minibatch_size=3; try "),
        ("ppo.unfrozen_layers=0", r"unfrozen_layers=0 trains nothing"),
        ("model.tiny.heads=5", r"model\.tiny: hidden=\d+ is not a multiple of heads=5"),
        ("runtime.precision=fp8", r"runtime\.precision='fp8'"),
        ("seed", r"--set 'seed' is not of the form key\.path=value"),
        ("seed=[1", r"--set seed: '\[1' is not a YAML value"),
        ("synthetic.train_posts.of=1", r"--set synthetic\.train_posts\.of: train_posts holds a value, not keys"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("demo", [override])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no preset named 'gptj6b'; did you mean gptj-6b\?"):
        load_config("gptj6b")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*mine\.yaml; presets are: demo"):
        load_config(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("ppo: [unclosed")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid YAML"):
        load_config(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("- a\n- list\n")
    with pytest.raises(ConfigError, match="holds a list, not keys"):
        load_config(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 2020-99-99", "is not valid YAML: month must be in 1..12"),
        (b"seed: \xff\xfe", "is not valid YAML"),
        (b"[" * 10_000, "is not valid YAML: nested too deeply"),
        (b"seed: " + b"1" * 5000, "is not valid YAML: Exceeds the limit"),
        (b"extends: [demo]", r"extends=\['demo'\] is no name"),
        (b"model: {base: 0x" + b"f" * 5000 + b"}", "model.base=a huge number: "),
        (b"seed: " + b"x" * 5000, "seed='xxx"),
        (b"? [1, 2]\n: 3", "is not valid YAML|unknown key"),
        (b'"a\\nb\\a": 1', r"unknown key a b\\x07; "),
    ],
)
def test_a_file_that_was_trouble_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(tmp_path / "mine.yaml"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("source", ["x" * 300 + ".yaml", "a\0.yaml", "\ud800.yaml", "/"])
def test_a_name_that_no_file_can_have_is_one_line(source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert str(caught.value).isprintable()


def test_a_file_extends_another_and_states_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\nppo: {iterations: 3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nppo: {gamma: 0.9}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.ppo.iterations, config.ppo.gamma) == (3, 0.9)
    assert config.model == load_config("demo").model


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_every_key_has_a_meaning() -> None:
    assert [key for key, info in fields() if not info.description] == []


def test_the_page_of_settings_is_current() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == settings_markdown(), "run `make docs`"


def test_the_page_names_every_key_once() -> None:
    named = re.findall(r"^\| `([a-z_.]+)` \|", settings_markdown(), flags=re.MULTILINE)
    assert named == [key for key, _ in fields()]
    leaves = _leaves(yaml.safe_load(Config().to_yaml()))
    assert set(named) == set(leaves)


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found
