"""What children need not import again, and where they write."""

from __future__ import annotations

import gc
import importlib
import os

import torch

from rlhf.pipeline import STAGE_NAMES

HEAVY = ("transformers.models.gptj.modeling_gptj", "torch.utils.tensorboard", "accelerate", "rlhf.running")
# In memory where there is such a place: syncing the disk for real tells nothing here, and takes its time.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def import_all() -> None:
    """All that stages import, so that forked children have it."""
    # As a stage's command sets it; the libraries look at it while they are imported, and save what they saw.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in (*HEAVY, *(f"rlhf.stages.{stage}" for stage in STAGE_NAMES)):
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()
