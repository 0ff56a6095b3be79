"""Resolve pyproject.toml's dependencies and pin them: lock.txt, runtime.txt and cuda.txt, and checkov.txt beside.

    make lock

One resolution of everything comes first, so that a package has the same version in every file that names it; nothing
is installed. Run it on Linux x86-64: cuda.txt is for there. What follows the script's name goes to every pip call.
checkov wants other versions than the rest: it has an environment, and so a resolution, of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What only a CUDA build of torch brings: runtime.txt and lock.txt leave it to that build, so that they serve CPU
# and GPU machines alike.
OF_CUDA = re.compile(r"(nvidia|cuda)-|triton$")
HEADER = "# Renewed by `make lock`; do not edit. {}\n"
MEANING = {
    "lock.txt": "Installs what the project runs, tests and lints with.",
    "runtime.txt": "Installs what the project runs with: the CPU image.",
    "cuda.txt": "Installs what the project runs with on GPUs, vLLM included: the CUDA image.",
    "checkov.txt": "Installs checkov, which lints the manifests, in an environment of its own.",
}


def main() -> None:
    """Write the four files."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    runtime = project["project"]["dependencies"] + extras["otel"] + project["build-system"]["requires"]
    lock, cuda = runtime + extras["dev"], runtime + extras["vllm"]
    # `===` compares the text: a build for the CPU, 2.13.0+cpu say, would leave out what CUDA needs.
    torch = next(name for name in runtime if name.startswith("torch==")).replace("==", "===")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        everything = resolve(Path(folder), [*lock, *cuda], [torch])
        write("cuda.txt", resolve(Path(folder), cuda, [torch, *everything]))
        for name, wanted in (("lock.txt", lock), ("runtime.txt", runtime)):
            pins = resolve(Path(folder), wanted, everything)
            write(name, (pin for pin in pins if not OF_CUDA.match(pin.partition("==")[0].lower())))
        write("checkov.txt", resolve(Path(folder), ["checkov>=3"], []))


def resolve(folder: Path, wanted: Iterable[str], constraints: Iterable[str]) -> list[str]:
    """What pip in the virtual environment `folder` would install for the wanted packages, pinned and sorted."""
    limits, report = folder / "constraints.txt", folder / "report.json"
    limits.write_text("\n".join(constraints), encoding="utf-8")
    options = ["--quiet", "--dry-run", "--ignore-installed", "--constraint", str(limits), "--report", str(report)]
    subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pip", "install", *options, *sys.argv[1:], *wanted], check=True
    )
    found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    # torch is pinned without its build suffix.
    return sorted((f"{item['name']}=={item['version'].partition('+')[0]}" for item in found), key=str.lower)


def write(name: str, pins: Iterable[str]) -> None:
    """Write one file of pins."""
    (HERE / name).write_text(HEADER.format(MEANING[name]) + "\n".join(pins) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
