"""Run inside a pod with `python -c`: what it may do there, and which ranks run in it, as JSON on stdout."""

import json
import os
import pathlib


def may_write(folder: str) -> bool:
    """Whether a file can be made there."""
    probe = pathlib.Path(folder, f".tried-{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def status(key: str) -> str:
    """A line of the first process's status."""
    lines = pathlib.Path("/proc/1/status").read_text(encoding="utf-8").splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{key}:"))


def ranks() -> list[tuple[int, int]]:
    """Rank and world size of the stage's processes here."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            pairs = [entry.partition(b"=")[::2] for entry in (process / "environ").read_bytes().split(b"\0")]
        except OSError:
            continue
        variables = dict(pairs)
        if b"rlhf.launched" in command and b"RANK" in variables:
            found.append((int(variables[b"RANK"]), int(variables[b"WORLD_SIZE"])))
    return sorted(found)


def facts() -> dict[str, object]:
    """All of it."""
    return {
        "user": os.getuid(),
        "group": os.getgid(),
        "first process": pathlib.Path("/proc/1/cmdline").read_bytes().split(b"\0")[0].decode(),
        "writes": [folder for folder in ("/", "/opt/rlhf", "/etc", "/var/tmp", "/runs", "/tmp") if may_write(folder)],
        "token": pathlib.Path("/var/run/secrets/kubernetes.io").exists(),
        "capabilities": int(status("CapEff"), 16) | int(status("CapBnd"), 16),
        "no new privileges": status("NoNewPrivs") == "1",
        "system calls filtered": status("Seccomp") == "2",
        "shared memory": os.statvfs("/dev/shm").f_frsize * os.statvfs("/dev/shm").f_blocks,
        "ranks": ranks(),
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
