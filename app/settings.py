"""Every setting of the service: `APP_*` environment variables, each with its meaning, unit and default.

`docs/service-settings.md` is generated from this class. A wrong or unknown variable stops the service
before anything is loaded: see `Settings.from_environment`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.schemas import PolicyName
from rlhf.errors import ConfigError

PREFIX = "APP_"
MIB = 2**20

Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+(/\S*)?$")]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^\s/]+)$")]
TokenCount = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def setting(default: Any, meaning: str, *, unit: str = "", **constraints: Any) -> Any:
    """Declare a variable with its meaning and unit; `...` as the default means that it must be given."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **constraints)


class Settings(BaseSettings):
    """What the service is told; an empty variable counts as one that is not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    # What is served.
    run_dir: Path = setting(..., "directory of a finished run; its `final` pointers name what is served")
    models: Annotated[tuple[PolicyName, ...], NoDecode] = setting(
        ("ppo", "sft"), "policies to load, separated by commas", min_length=1
    )
    engine: Literal["builtin", "vllm"] = setting("builtin", "what writes the summaries; `vllm` needs the extra `vllm`")
    policy_device: Device = setting("auto", "where the policies live: `auto`, `cpu`, `cuda` or `cuda:N`")
    reward_device: Device = setting("auto", "where the reward model lives: `auto`, `cpu`, `cuda` or `cuda:N`")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the weights; `auto` is float32 on the CPU and bfloat16 on CUDA"
    )
    threads: int | None = setting(
        None, "CPU threads of a model; half of the cores that the process may use when empty", unit="threads", ge=1
    )
    watch: bool = setting(False, "load what `final` names whenever it changes")
    watch_seconds: Seconds = setting(10, "how often `final` is looked at, with watch", unit="seconds")

    # How much at once.
    slots: TokenCount = setting(32, "summaries that one policy writes at the same time", unit="summaries")
    prefill_tokens: TokenCount = setting(1024, "prompt tokens that may join a running batch at one step", unit="tokens")
    score_batch_tokens: TokenCount = setting(8192, "tokens that the reward model reads at once", unit="tokens")
    queue_tokens: TokenCount = setting(
        200_000, "prompt tokens, and room for the summary, that may wait in one queue; then 429", unit="tokens"
    )
    max_wait_seconds: Seconds = setting(30, "longest that a request may wait in a queue; then 429", unit="seconds")
    timeout_seconds: Seconds = setting(
        120, "longest that a request may take, and what it gets when it does not say; then 504", unit="seconds"
    )
    max_posts: int = setting(256, "posts in one request to /summarize", unit="posts", ge=1)
    max_items: int = setting(1024, "items in one request to /score", unit="items", ge=1)
    max_best_of: int = setting(16, "candidates for one post; no more than slots", unit="candidates", ge=1)
    rate_limit_per_minute: int = setting(
        0, "requests of one key, or of one address without keys, also as a burst; 0 is no limit", unit="requests", ge=0
    )

    # Who may ask.
    host: str = setting("127.0.0.1", "address to listen on; `0.0.0.0` is every one", min_length=1)
    port: int = setting(8000, "port to listen on; 0 takes a free one, which the log names", ge=0, le=65535)
    api_keys_file: Path | None = setting(
        None,
        "a `name:sha256` line a key, as `python -m app new-key NAME` prints; then /summarize, /score and /v1 need "
        "one, while the page, /docs, /problems, /metrics and the probes stay open",
    )
    admin_keys_file: Path | None = setting(None, "the same, for /admin; without it /admin answers 403")
    allow_anonymous: bool = setting(False, "serve without keys on an address that is not loopback")
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = setting(
        (), "addresses or networks, separated by commas, whose X-Forwarded-For names the caller"
    )
    cors_origins: Annotated[tuple[Origin, ...], NoDecode] = setting(
        (), "origins, separated by commas, whose pages may ask; `*` is every one; none when empty"
    )

    # Connections.
    max_connections: int = setting(
        2048, "connections at once; above it all but the probes get 503, above twice as many nothing does", ge=1
    )
    max_body_bytes: int = setting(2 * MIB, "size of a request's body; then 413", unit="bytes", ge=1)
    max_buffered_bytes: int = setting(
        256 * MIB, "bodies of all requests in progress together; then 429", unit="bytes", ge=1
    )
    header_timeout_seconds: Seconds = setting(10, "a connection whose headers take longer is closed", unit="seconds")
    body_timeout_seconds: Seconds = setting(10, "a body that takes longer is answered 408", unit="seconds")
    write_timeout_seconds: Seconds = setting(
        30, "a connection whose caller does not read its answer for so long is cut", unit="seconds"
    )
    keep_alive_seconds: Seconds = setting(15, "an idle connection is closed after this", unit="seconds")
    drain_seconds: float = setting(
        30, "after SIGTERM, time to finish what was accepted", unit="seconds", ge=0, allow_inf_nan=False
    )

    # What is told.
    stall_seconds: Seconds = setting(120, "a step of a model that takes longer fails /livez", unit="seconds")
    otlp_endpoint: Url | None = setting(
        None, "base address of an OpenTelemetry collector (OTLP over HTTP); needs the extra `otel`"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least level that is logged")

    @field_validator("models", "trusted_proxies", "cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.max_best_of > self.slots:
            raise ValueError(
                f"APP_MAX_BEST_OF={self.max_best_of} is more than APP_SLOTS={self.slots}; lower it or raise the slots"
            )
        if self.max_body_bytes > self.max_buffered_bytes:
            raise ValueError(
                f"APP_MAX_BODY_BYTES={self.max_body_bytes} is more than APP_MAX_BUFFERED_BYTES="
                f"{self.max_buffered_bytes}, which all bodies share; raise the latter"
            )
        if self.allow_anonymous and self.api_keys_file is not None:
            raise ValueError(
                f"APP_ALLOW_ANONYMOUS=true contradicts APP_API_KEYS_FILE={self.api_keys_file}; drop one of them"
            )
        if self.admin_keys_file is not None and self.admin_keys_file == self.api_keys_file:
            raise ValueError(
                f"APP_ADMIN_KEYS_FILE={self.admin_keys_file} is also APP_API_KEYS_FILE: every caller could reload; "
                "give /admin keys of its own"
            )
        if not (self.api_keys_file or self.allow_anonymous or is_loopback(self.host)):
            raise ValueError(
                f"APP_HOST={self.host} would serve anyone who reaches it; set APP_API_KEYS_FILE, "
                "or APP_ALLOW_ANONYMOUS=true if that is meant"
            )
        return self

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment of this process.

        Raises ConfigError, one line that names each wrong variable, its value and the remedy.
        """
        _refuse_unknown(os.environ)
        try:
            settings = cls()
        except ValidationError as error:
            raise ConfigError(_explain(error, os.environ)) from error
        if not settings.run_dir.is_dir():
            raise ConfigError(
                f"APP_RUN_DIR={settings.run_dir} is not a directory; name the directory of a finished run, "
                "for example runs/demo after `make demo`"
            )
        return settings


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = [variable(field) for field in Settings.model_fields]
    # The names are read without regard to case, as pydantic-settings does.
    unknown = [name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known]
    if not unknown:
        return
    lines = []
    for name in sorted(unknown):
        close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.6)
        lines.append(f"unknown variable {name}; " + (f"did you mean {close[0]}?" if close else "unset it"))
    raise ConfigError("; ".join(lines) + (_service_link_hint(unknown)))


def _service_link_hint(names: list[str]) -> str:
    """Kubernetes gives every pod APP_PORT and more when a Service in its namespace is named `app`."""
    if any(re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_TCP", name.upper()) for name in names):
        return "; a Kubernetes Service named app sets these: give the pod enableServiceLinks: false"
    return ""


def _explain(error: ValidationError, environment: Mapping[str, str]) -> str:
    given = {name.upper(): value for name, value in environment.items()}
    lines = []
    for problem in error.errors():
        if not problem["loc"]:
            lines.append(problem["msg"].removeprefix("Value error, "))
            continue
        name = variable(str(problem["loc"][0]))
        if problem["type"] == "missing":
            lines.append(f"{name} is not set; {_meaning(name)}")
        else:
            lines.append(f"{name}={given.get(name, '')!r}: {problem['msg']}; it is: {_meaning(name)}")
    return "; ".join(dict.fromkeys(lines))


def _meaning(name: str) -> str:
    return Settings.model_fields[name.removeprefix(PREFIX).lower()].description or ""
