"""Resolve pyproject.toml's dependencies in a fresh environment and pin them all in lock.txt.

    make lock

torch is pinned without its build suffix, and what only a CUDA build of it brings is left to that build,
so that one file serves CPU and GPU machines.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADER = "# Renewed by `make lock`; do not edit. Installs what the project runs, tests and lints with.\n"
TOOLS = {"pip"}


def main() -> None:
    """Write lock.txt."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + extras["otel"] + extras["dev"] + project["build-system"]["requires"]
    torch = next(name for name in wanted if name.startswith("torch=="))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        # torch first: another package's range must not choose its build.
        for packages in ([torch], wanted):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *sys.argv[1:], *packages], check=True)
        frozen = subprocess.run([python, "-m", "pip", "freeze", "--all"], check=True, capture_output=True, text=True)
    pins = [re.sub(r"\+\S+$", "", line) for line in frozen.stdout.splitlines()]
    kept = [pin for pin in pins if re.split(r"[=@ ]", pin)[0].lower() not in TOOLS and not pin.startswith("nvidia-")]
    (HERE / "lock.txt").write_text(HEADER + "\n".join(sorted(kept, key=str.lower)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
