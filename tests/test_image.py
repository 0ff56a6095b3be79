"""The CPU image, built and run as clusters run it: its own user, a read-only root, /tmp and /runs.

It takes minutes and gigabytes, so it is done only when asked for:

    RLHF_IMAGE=rlhf-summarizer:0.1.0-cpu python -m pytest tests/test_image.py   # an image that is there
    RLHF_TEST_IMAGE=1 python -m pytest tests/test_image.py                      # builds one with `make image`
    RLHF_TEST_IMAGE=1 RLHF_IMAGE_ARGS="--build-arg CPU_IMAGE=..." python -m pytest tests/test_image.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf import __version__
from rlhf.checkpoint import StageDir, verify
from rlhf.pipeline import STAGE_NAMES
from tests.conftest import REPOSITORY
from tests.containers import USER, Container, Engine, Spec, lacking, open_engine, run
from tests.test_pipeline import SMALL

NOT_SHIPPED = ("gcc", "cc", "g++", "make", "nvcc", "pip", "git", "pytest", "mypy", "ruff")
LOOK_INSIDE = """
import importlib.util, json, pathlib, shutil, sys, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
compiled = {importlib.util.cache_from_source(str(path)): path for path in site.rglob("*.py")}
print(json.dumps({
    "found": [name for name in sys.argv[1:] if shutil.which(name) or importlib.util.find_spec(name)],
    "ours": sorted(path.name for path in site.iterdir() if path.name in ("rlhf", "app", "tests", "k8s", "docs")),
    "editable": [path.name for path in site.glob("*.pth") if "editable" in path.name],
    "slow": [str(path) for name, path in compiled.items() if not pathlib.Path(name).exists()],
    "slow_library": not pathlib.Path(importlib.util.cache_from_source(json.__file__)).exists(),
    "caches": [str(path) for path in pathlib.Path("/").glob("*/.cache/*")],
}))
"""
OPTIMIZERS = """
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import FusedAdamBuilder
FusedAdamBuilder().load()
ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
options = {"lr": 0.1, "weight_decay": 0.01}
for optimizer in (DeepSpeedCPUAdam([ours], **options), torch.optim.AdamW([theirs], **options)):
    for number in range(3):
        optimizer.param_groups[0]["params"][0].grad = torch.linspace(number, 1, 1000)
        optimizer.step()
torch.testing.assert_close(ours, theirs)
"""
POST = {"subreddit": "pets", "title": "my cat", "body": "i lost my cat. it was on saturday."}


@pytest.fixture(scope="module")
def image() -> str:
    """The name of a CPU image: the one that is named, or one that is built when asked for."""
    named, asked = os.environ.get("RLHF_IMAGE"), os.environ.get("RLHF_TEST_IMAGE")
    if not named and not asked:
        pytest.skip("images take minutes and gigabytes: set RLHF_TEST_IMAGE=1 to build one, or RLHF_IMAGE to its name")
    if missing := lacking():
        pytest.skip(missing)
    if named:
        return named
    built, options = "localhost/rlhf-test:cpu", os.environ.get("RLHF_IMAGE_ARGS", "")
    command = ["make", "image", "ACCELERATOR=cpu", f"IMAGE={built}", f"BUILD_ARGS={options}"]
    answer = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
    return built


@pytest.fixture(scope="module")
def engine(image: str) -> Iterator[Engine]:
    """What runs containers of the image."""
    opened = open_engine(image)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Path]:
    """A folder that the image's user may write; it is emptied by him, whoever runs the tests."""
    folder = tmp_path_factory.mktemp("volume")
    folder.chmod(0o777)
    yield folder
    run(engine, Spec(command=("find", "/runs", "-mindepth", "1", "-delete"), runs=folder))


@pytest.fixture(scope="module")
def finished(engine: Engine, volume: Path) -> Path:
    """A run of all six stages on a small world, without a network."""
    answer = run(engine, Spec(("run", *settings(SMALL), "--run", "small"), runs=volume), seconds=900)
    assert answer.returncode == 0, answer.stderr
    return volume / "small"


@pytest.fixture
def started(engine: Engine) -> Iterator[Callable[[Spec], Container]]:
    """Starts containers that are gone when the test is."""
    containers: list[Container] = []

    def start(spec: Spec) -> Container:
        containers.append(engine.start(spec))
        return containers[-1]

    yield start
    for container in containers:
        if container.process.poll() is None:
            engine.signal(container, "KILL")
        container.process.communicate()


@pytest.fixture
def fetched(finished: Path, request: pytest.FixtureRequest) -> Path:
    """A run, named like the test, in which only `fetch` is done."""
    run_dir = finished.parent / request.node.name
    shutil.copytree(finished / "fetch", run_dir / "fetch", symlinks=True)
    for path in (run_dir, *run_dir.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return run_dir


def settings(values: dict[str, object]) -> list[str]:
    return ["--config", "demo", *(word for key, value in values.items() for word in ("--set", f"{key}={value}"))]


def wait_until(met: Callable[[], bool], container: Container, *, seconds: float = 120) -> None:
    """Wait for something that a container does; fails with its log when it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while not met():
        assert container.process.poll() is None, "".join(container.process.communicate())
        assert time.monotonic() < deadline, f"nothing after {seconds} seconds"
        time.sleep(0.1)


def ask(url: str, body: object = None) -> tuple[int, str]:
    """Status and body of an answer; 0 where nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_it_says_what_it_is(engine: Engine) -> None:
    config = engine.config()
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "rlhf"]
    assert config["Cmd"] == ["--help"]
    assert config["ExposedPorts"].keys() == {"8000/tcp"}
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items() if ".opencontainers." in key}
    assert labels["title"] == "rlhf-summarizer"
    assert labels["version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["revision"])


def test_help_is_what_it_does_when_told_nothing(engine: Engine) -> None:
    answer = run(engine, Spec(tuple(engine.config()["Cmd"])))
    assert answer.returncode == 0, answer.stderr
    for stage in STAGE_NAMES:
        assert f"\n    {stage} " in answer.stdout


def test_nothing_is_inside_that_no_job_needs(engine: Engine) -> None:
    command = ("python", "-c", LOOK_INSIDE, *NOT_SHIPPED)
    answer = run(engine, Spec(command=command))
    assert answer.returncode == 0, answer.stderr
    seen = json.loads(answer.stdout)
    assert seen["found"] == []
    assert seen["ours"] == ["app", "rlhf"]
    assert seen["editable"] == []
    assert seen["caches"] == []


def test_all_is_compiled_because_nothing_can_be_later(engine: Engine) -> None:
    seen = json.loads(run(engine, Spec(command=("python", "-c", LOOK_INSIDE))).stdout)
    # torch keeps a file for Python 3.12 and newer, which older ones cannot compile.
    assert [path for path in seen["slow"] if "py312" not in path] == []
    assert not seen["slow_library"]


def test_its_user_can_write_two_folders(engine: Engine) -> None:
    """By the permissions, so that it holds where the root is not read-only, too."""
    condition = f"-perm -0002 -o -user {USER} -o -group {USER}"
    find = f"find / -xdev '(' -type f -o -type d ')' '(' {condition} ')' -print 2>/dev/null"
    assert run(engine, Spec(command=("sh", "-c", find))).stdout.split() == ["/tmp", "/runs"]


def test_no_program_lends_its_owners_rights(engine: Engine) -> None:
    answer = run(engine, Spec(command=("find", "/usr", "/opt", "-type", "f", "-perm", "/6000")))
    assert (answer.returncode, answer.stdout) == (0, "")


def test_every_cache_is_below_tmp(engine: Engine) -> None:
    environment = dict(pair.split("=", 1) for pair in engine.config()["Env"])
    kept = {key: value for key, value in environment.items() if re.search(r"HOME|CACHE|DIR$|EXTENSIONS", key)}
    assert kept.pop("RLHF_RUNS_DIR") == "/runs"
    assert {key for key, value in kept.items() if not value.startswith("/tmp")} == set()
    assert {"HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"} <= kept.keys()


@pytest.mark.parametrize("command", [("python", "-m", "app", "--version"), ("tensorboard", "--version")])
def test_the_service_and_tensorboard_are_in_it(engine: Engine, command: tuple[str, ...]) -> None:
    assert run(engine, Spec(command=command)).returncode == 0


def test_another_user_will_do(engine: Engine) -> None:
    """Clusters may give any number, one without a name."""
    code = "import getpass, pathlib, torch._inductor.codecache, rlhf; getpass.getuser(); pathlib.Path.home()"
    answer = run(engine, Spec(command=("python", "-c", code), user=20002))
    assert answer.returncode == 0, answer.stderr


def test_all_stages_run_on_a_read_only_root(finished: Path) -> None:
    for name in STAGE_NAMES:
        verify(StageDir(finished, name).final())
    assert {path.stat().st_uid for path in finished.rglob("*")} == {USER}
    assert (finished / "report" / "index.html").is_file()


def test_the_service_answers(finished: Path, started: Callable[[Spec], Container]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"APP_RUN_DIR": f"/runs/{finished.name}", "APP_PORT": str(port), "APP_ALLOW_ANONYMOUS": "true"}
    command = ("/usr/bin/tini", "--", "python", "-m", "app")
    service = started(Spec(command=command, environment=environment, runs=finished.parent, network=True))
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: ask(f"{url}/readyz")[0] == 200, service)
    assert ask(f"{url}/livez")[0] == 200
    status, body = ask(f"{url}/summarize", {"posts": [POST]})
    assert status == 200, body
    assert "summary" in json.loads(body)["results"][0]


def test_deepspeeds_optimizers_need_no_compiler(engine: Engine) -> None:
    answer = run(engine, Spec(command=("python", "-c", OPTIMIZERS), environment={"DS_ACCELERATOR": "cpu"}))
    assert answer.returncode == 0, answer.stderr


def test_two_processes_share_a_step_by_deepspeed(engine: Engine, fetched: Path) -> None:
    """Its processes on a CPU speak through an operator that would be compiled at first use, too."""
    changes = settings(SMALL | {"sft.deepspeed": "zero2", "sft.micro_batch_size": 4})
    command = ("launch", "sft", *changes, "--run", fetched.name, "--gpus", "0", "--processes", "2")
    answer = run(engine, Spec(command, runs=fetched.parent), seconds=300)
    assert answer.returncode == 0, answer.stderr
    verify(StageDir(fetched, "sft").final())


def test_sigterm_reaches_the_stage_through_tini(
    engine: Engine, fetched: Path, started: Callable[[Spec], Container]
) -> None:
    endless = SMALL | {"sft.max_steps": 100_000, "sft.epochs": 100_000, "sft.eval_every_steps": 100_000}
    stage = started(Spec(("sft", *settings(endless), "--run", fetched.name), runs=fetched.parent))
    wait_until((fetched / "sft" / "metrics.jsonl").exists, stage)
    assert engine.execute(stage, "cat", "/proc/1/comm") == "tini\n"
    engine.signal(stage, "TERM")
    output, error = stage.process.communicate(timeout=60)
    assert stage.process.returncode == 75, output + error
    assert any(path.name.startswith("step-") for path in (fetched / "sft").iterdir())
