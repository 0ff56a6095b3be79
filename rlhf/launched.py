"""One of several stage processes: `python -m rlhf.launched FOLDER STAGE [options]`, started by torchrun's agent.

It runs the command as `python -m rlhf` would, and leaves exit code and line in FOLDER for the launcher.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from rlhf.__main__ import attempt
from rlhf.console import LAST_WORDS, ignore_signals
from rlhf.launcher.outcome import leave, stopped_early, words_of
from rlhf.processes import die_with


def main() -> int:
    """Run the stage, and leave what the launcher has to know."""
    folder, local_rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    die_with(int(os.environ["RLHF_AGENT_PID"]))
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ[LAST_WORDS] = str(folder / words_of(local_rank))
        (folder / f"begun-{local_rank}").touch()
        code, line = attempt(sys.argv[2:])
    except KeyboardInterrupt:
        early = stopped_early(time.time())
        code, line = early.code, early.line
    ignore_signals()
    leave(folder, local_rank, code, line)
    return code


if __name__ == "__main__":
    sys.exit(main())
