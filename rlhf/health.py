"""Numbers that go wrong: a bad step is skipped and counted, and a run of them ends the training before it is saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import StageDir
from rlhf.errors import DivergedError
from rlhf.processes import is_first_process

logger = logging.getLogger(__name__)

BAD_BATCHES = "bad-batches.jsonl"


class Health:
    """Counts the steps that were skipped because a loss, a score or a gradient was not finite, or the KL exploded.

    `bad-batches.jsonl` lists them. It is part of the state, so that a resumed run neither misses nor doubles a line.
    """

    def __init__(self, stage: StageDir, *, tolerate: int) -> None:
        self.in_a_row = 0
        self._stage, self._tolerate = stage, tolerate
        self._lines: list[dict[str, Any]] = []
        if (stage.path / BAD_BATCHES).exists():
            self._write()

    @property
    def skipped(self) -> int:
        """Steps skipped since the beginning."""
        return len(self._lines)

    @property
    def is_well(self) -> bool:
        """Whether the last step was fine, so that a checkpoint may be published."""
        return self.in_a_row == 0

    def fine(self) -> None:
        """A step went well."""
        self.in_a_row = 0

    def skip(self, step: int, reason: str, ids: Sequence[str]) -> None:
        """Note a step that was skipped, with the ids of its batch.

        Raises DivergedError when too many came in a row; no checkpoint has been published since the first of them.
        """
        self.in_a_row += 1
        logger.warning("skipped step=%d: %s; batch of %d, see %s", step, reason, len(ids), BAD_BATCHES)
        self._lines.append({"step": step, "reason": reason, "ids": list(ids)})
        self._write()
        if self.in_a_row >= self._tolerate:
            saved = self._stage.steps()
            good = f"the last good checkpoint is {saved[-1][1]}" if saved else "no checkpoint was saved"
            raise DivergedError(
                f"{self.in_a_row} steps of {self._stage.stage} in a row went wrong, the last at step {step}: {reason}; "
                f"{good}, the batches are in {self._stage.path / BAD_BATCHES}: look at them, or lower "
                f"{self._stage.stage}.optimizer.learning_rate in a new run"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"in_a_row": self.in_a_row, "lines": list(self._lines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.in_a_row, self._lines = state["in_a_row"], list(state["lines"])
        if self._lines:
            self._write()

    def _write(self) -> None:
        if is_first_process():
            self._stage.write_text(BAD_BATCHES, "".join(json.dumps(line) + "\n" for line in self._lines))


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise DivergedError for weights that must not be published."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"{name} is not finite, so nothing is saved; the last checkpoint is good")
