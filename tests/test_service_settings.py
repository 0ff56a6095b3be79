"""The service's settings: mistakes are named before anything is loaded, the page is current."""

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, is_loopback, variable
from app.settings_reference import settings_markdown
from rlhf.errors import ConfigError
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("APP_"):
            monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, run_dir: Path, **given: str) -> Settings:
    for name, value in ({"APP_RUN_DIR": str(run_dir)} | given).items():
        monkeypatch.setenv(name, value)
    return Settings.from_environment()


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = read(
        monkeypatch,
        tmp_path,
        APP_MODELS="sft, sft",
        APP_PORT="9000",
        APP_WATCH="true",
        APP_MAX_WAIT_SECONDS="2.5",
        APP_CORS_ORIGINS="https://a.example,http://b.example:81",
        APP_THREADS="",
    )
    assert (settings.run_dir, settings.models, settings.port, settings.watch) == (tmp_path, ("sft",), 9000, True)
    assert (settings.max_wait_seconds, settings.threads) == (2.5, None)
    assert settings.cors_origins == ("https://a.example", "http://b.example:81")


def test_settings_do_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings(run_dir=tmp_path).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"APP_PORTT": "1"}, r"^unknown variable APP_PORTT; did you mean APP_PORT\?$"),
        ({"app_slotz": "1"}, r"^unknown variable app_slotz; did you mean APP_SLOTS\?$"),
        ({"APP_QWERTYUIOP": "1"}, r"^unknown variable APP_QWERTYUIOP; unset it$"),
        ({"APP_SERVICE_HOST": "10.0.0.1"}, r"Kubernetes Service named app .* enableServiceLinks: false$"),
        ({"APP_PORT": "http"}, r"^APP_PORT='http': .*valid integer.*; it is: port to listen on"),
        ({"APP_PORT": "65536"}, r"^APP_PORT='65536': .*less than or equal to 65535"),
        ({"APP_MODELS": "ppo,pp"}, r"^APP_MODELS='ppo,pp': Input should be 'ppo' or 'sft'"),
        ({"APP_MODELS": ","}, r"^APP_MODELS=',': .*at least 1"),
        ({"APP_TIMEOUT_SECONDS": "inf"}, r"^APP_TIMEOUT_SECONDS='inf': .*finite"),
        ({"APP_ENGINE": "tgi"}, r"^APP_ENGINE='tgi': Input should be 'builtin' or 'vllm'"),
        ({"APP_POLICY_DEVICE": "gpu"}, r"^APP_POLICY_DEVICE='gpu': .*`cuda:N`$"),
        ({"APP_CORS_ORIGINS": "http://a.example/path"}, r"^APP_CORS_ORIGINS='http://a.example/path': "),
        ({"APP_OTLP_ENDPOINT": "collector:4318"}, r"^APP_OTLP_ENDPOINT='collector:4318': "),
        ({"APP_SLOTS": "8"}, r"^APP_MAX_BEST_OF=16 is more than APP_SLOTS=8; lower it or raise the slots$"),
        ({"APP_MAX_BUFFERED_BYTES": "9"}, r"^APP_MAX_BODY_BYTES=2097152 is more than APP_MAX_BUFFERED_BYTES=9"),
        ({"APP_HOST": "0.0.0.0"}, r"^APP_HOST=0\.0\.0\.0 would serve anyone .* APP_API_KEYS_FILE"),
        ({"APP_HOST": "::"}, r"^APP_HOST=:: would serve anyone"),
        ({"APP_ALLOW_ANONYMOUS": "true", "APP_API_KEYS_FILE": "k"}, r"^APP_ALLOW_ANONYMOUS=true contradicts"),
        ({"APP_ADMIN_KEYS_FILE": "k", "APP_API_KEYS_FILE": "k"}, r"every caller could reload"),
        ({"APP_RUN_DIR": "/nowhere"}, r"^APP_RUN_DIR=/nowhere is not a directory; .*`make demo`$"),
        ({"APP_RUN_DIR": ""}, r"^APP_RUN_DIR is not set; directory of a finished run"),
        ({"APP_PORT": "a", "APP_SLOTS": "b"}, r"^APP_SLOTS='b': .*; APP_PORT='a': "),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(monkeypatch, tmp_path, **given)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    "given",
    [
        {"APP_HOST": "127.0.0.7"},
        {"APP_HOST": "::1"},
        {"APP_HOST": "localhost"},
        {"APP_HOST": "0.0.0.0", "APP_ALLOW_ANONYMOUS": "true"},
        {"APP_HOST": "0.0.0.0", "APP_API_KEYS_FILE": "keys"},
    ],
)
def test_it_may_be_open_where_that_is_safe_or_meant(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read(monkeypatch, tmp_path, **given).host == given["APP_HOST"]


def test_a_name_that_may_resolve_elsewhere_is_not_loopback() -> None:
    assert not is_loopback("localhost.example")


def test_the_page_of_settings_is_current() -> None:
    page = (REPOSITORY / "docs" / "service-settings.md").read_text(encoding="utf-8")
    assert page == settings_markdown(), "run `make docs`"


def test_the_page_names_every_variable_once_with_a_meaning() -> None:
    rows = re.findall(r"^\| `(APP_[A-Z_]+)` \| (\S.*?) \|", settings_markdown(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == [variable(field) for field in Settings.model_fields]


def test_a_unit_stands_in_every_name_that_ends_in_one() -> None:
    for name, info in Settings.model_fields.items():
        for unit in ("seconds", "bytes", "tokens"):
            if name.endswith(f"_{unit}"):
                assert info.json_schema_extra == {"unit": unit}, name
