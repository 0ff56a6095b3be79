"""What newer libraries broke in trlX 0.7.0 (CarperAI/trlx at 3340c2f), mended while our run lasts.

Each mend says why it is there. None changes a file of trlX; all but the import of `prepare_model_for_int8_training`
are undone at the end. Versions that this was not checked with are refused: a mend that does not fit fails silently.

    what breaks                               why                                             mended in
    import                                    peft renamed prepare_model_for_int8_training    _importable
    reference: config.add_cross_attention     gone from GPT-J's configuration                 reference_forward
    reference: get_head_mask                  gone from transformers' models                  reference_forward
    reference: sees tokens to come            blocks no longer make their own causal mask     reference_forward
    loading wants pytorch_model.bin           everybody writes safetensors now                export.trlx_copy
    start without git                         it names the run by a git tag                   mended
    table of posts on stdout                  we log no texts                                 mended
    W&B online, whatever WANDB_MODE says      it passes mode=online                           settings: tracker None
    its checkpoints                           names that AutoModel does not know; under       trainer.save_pretrained,
                                              DeepSpeed a keyword that accelerate lacks       export
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import ConfigError

COMMIT = "3340c2f3a56d1d14fdd5f13ad575121fa26b6d92"
CHECKED = {"trlx": ("0.7.0",), "transformers": ("5.18", "5.19"), "peft": ("0.18", "0.21")}
"""Beginnings of the versions that the mends were checked with, by `tests/test_trlx_engine.py`."""
INSTALL = "docs/trlx.md says how to install trlX"
REFERENCES = ("GPTJForCausalLM", "GPT2LMHeadModel")
"""Models whose reference branch is mended."""
_ABSENT = object()


def check_versions() -> None:
    """Raise ConfigError where trlX is not installed, or where it or a library has another version than was checked."""
    for package, checked in CHECKED.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"ppo.engine=trlx, but {package} is not installed; {INSTALL}") from None
        if not any(found == one or found.startswith(f"{one}.") for one in checked):
            raise ConfigError(
                f"ppo.engine=trlx was checked with {package} {' or '.join(checked)}, and {found} is installed; "
                f"install that, or use ppo.engine: builtin"
            )
    commit = _installed_commit()
    if commit and commit != COMMIT:
        raise ConfigError(
            f"ppo.engine=trlx was checked with trlX at {COMMIT[:7]}, and {commit[:7]} is installed; {INSTALL}"
        )


def _installed_commit() -> str | None:
    """The commit that pip noted when it installed trlX from git; None where it came otherwise."""
    noted = importlib.metadata.distribution("trlx").read_text("direct_url.json")
    commit = json.loads(noted).get("vcs_info", {}).get("commit_id") if noted else None
    return str(commit) if commit else None


@contextmanager
def mended(*, cpu: bool) -> Iterator[None]:
    """trlX as it was meant to work, until the block ends; cpu keeps its accelerator off a GPU that is there.

    Raises ConfigError for versions that were not checked.
    """
    check_versions()
    with ExitStack() as undo:
        undo.enter_context(_importable())
        base = importlib.import_module("trlx.trainer.accelerate_base_trainer")
        branches = importlib.import_module("trlx.models.modeling_ppo")
        trlx_logging = importlib.import_module("trlx.utils.logging")
        for owner, name, value in (
            (branches.GPTModelBranch, "forward", reference_forward),
            # Without git on the path, the name that it gives the run would end the run.
            (base, "get_git_tag", lambda: ("unknown", "unknown")),
            # Its evaluation prints posts and summaries on stdout, where they end up in logs.
            (base, "Console", partial(base.Console, quiet=True)),
        ):
            undo.enter_context(replaced(owner, name, value))
        if cpu:
            undo.enter_context(_environment("ACCELERATE_USE_CPU", "true"))
        verbosity = trlx_logging.get_verbosity()
        undo.callback(trlx_logging.set_verbosity, verbosity)
        trlx_logging.set_verbosity(trlx_logging.ERROR)
        trlx_logging.disable_progress_bar()
        undo.callback(trlx_logging.enable_progress_bar)
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute, until the block ends."""
    before = getattr(owner, name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def reference_forward(
    branch: Any,
    hidden_states: Tensor,
    output_shape: torch.Size,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_dict: bool | None = True,
    **unused: Any,
) -> Any:
    """`GPTModelBranch.forward`: the frozen copy of the top blocks on the trunk's hidden states, [B, T, H].

    trlX's own asks for a configuration key and a method that are gone, and passes only the padding mask, which
    today's blocks take for all there is to hide: the reference would see the tokens to come, and KL would not be 0.
    unused are generation's arguments (a cache, head masks, attentions), which trlX leaves empty here.
    """
    from transformers.masking_utils import create_causal_mask

    mask = create_causal_mask(
        config=branch.config,
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
    )
    for block in branch.decoder_blocks:
        output = block(hidden_states, attention_mask=mask, position_ids=position_ids, use_cache=False)
        hidden_states = output if isinstance(output, Tensor) else output[0]
    logits = branch.lm_head(branch.final_norm(hidden_states).view(output_shape))
    if not return_dict:
        return (logits, None, None)
    output_class = importlib.import_module("trlx.models.modeling_ppo").CausalLMOutputWithValue
    return output_class(logits=logits)


@contextmanager
def _importable() -> Iterator[None]:
    """peft's old name of a function that trlX imports, and only calls for 8-bit models, which we refuse."""
    import peft

    with replaced(peft, "prepare_model_for_int8_training", _refuse_8bit):
        try:
            importlib.import_module("trlx")
        except ImportError as error:
            raise ConfigError(f"ppo.engine=trlx, but trlX cannot be imported: {error}; {INSTALL}") from error
        yield


def _refuse_8bit(*arguments: object) -> None:
    raise NotImplementedError("trlX's 8-bit models need a peft of 2023")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
