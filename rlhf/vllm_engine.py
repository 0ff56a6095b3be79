"""vLLM behind the engines' interface, the extra for GPUs: `pip install '.[vllm]'`.

It runs in this process, takes token ids and gives token ids; no text passes through it and nothing is fetched.

Shapes: B prompts, R response columns (right-padded).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.errors import PrerequisiteError, RlhfError
from rlhf.generation import Generation
from rlhf.model_files import CONFIG, open_config
from rlhf.sampling import Sampling
from rlhf.sequences import max_positions
from rlhf.skeleton import build_skeleton
from rlhf.slots import Request
from rlhf.vllm_batch import StartedVllm, VllmBatch
from rlhf.vllm_process import import_vllm, start_vllm, stop_vllm, turn
from rlhf.weights import weight_files

logger = logging.getLogger(__name__)


class VllmEngine:
    """A policy from a directory, run by vLLM.

    Greedy, it gives the built-in engine's tokens, up to rounding. Sampled, it draws in its own way: a seed gives the
    same response whatever runs beside it, but another one than the built-in engine's. The highest temperature is 2,
    and one between 0 and 0.01 counts as 0.01.

    Log-probabilities are of the full softmax at the sampling temperature, as `Generation` wants them, while top_k,
    top_p and min_new_tokens exclude nothing; where one does, they are of the softmax over what is left.

    The engines of a process take turns: a step, a start and the loading of weights are a turn each.
    """

    def __init__(
        self,
        directory: Path,
        *,
        eos_id: int,
        pad_id: int,
        slots: int,
        device: str,
        dtype: torch.dtype,
        max_sequence_tokens: int | None = None,
        load_weights: bool = True,
    ) -> None:
        """Start vLLM and load the weights, or leave them random until `sync`. device is `cpu`, `cuda`, `cuda:<number>`.

        slots is how many rows run at once. max_sequence_tokens is how long a prompt and its response may be together,
        by default the model's positions; memory for `slots` of that length is taken at once.
        Raises ConfigError when vLLM is not installed or does not run on the device, and PrerequisiteError when the
        directory holds no model that it can run.
        """
        self._pad_id, self._slots, self._device = pad_id, slots, torch.device(device)
        vllm, skeleton = import_vllm(self._device), _skeleton(directory)
        try:
            llm = start_vllm(
                vllm,
                directory,
                slots=slots,
                device=self._device,
                dtype=dtype,
                weights=skeleton.num_parameters(),
                max_sequence_tokens=max_sequence_tokens or max_positions(skeleton),
            )
            self._started = StartedVllm(vllm, llm, skeleton, self._device, eos_id)
            if load_weights:
                self.sync(_read_weights(directory, skeleton))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise PrerequisiteError(f"vLLM cannot run {directory}: {' '.join(str(error).split())}") from error
        logger.info("started vllm=%s slots=%d device=%s path=%s", vllm.__version__, slots, device, directory)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        chances_BR: Tensor | None = None,
        trunk_layers: int | None = None,
    ) -> Generation:
        """A response to each prompt, on the engine's device; prompts beyond `slots` wait for a place.

        The same generator state and prompts give the same responses. chances_BR, in a generator's place, are uniform
        numbers that were drawn before (`generation.draw_chances`): a prompt and its row of them give the same
        response in any company. vLLM shows no hidden states: whatever trunk_layers asks for, there is no trunk. Raises
        ValueError for prompts that the model cannot take and RlhfError when its log-probabilities are not finite.
        """
        if len(prompts) == 0:
            raise ValueError("no prompts: give at least one")
        seeds = _drawn_seeds(len(prompts), generator) if chances_BR is None else _seeds_of(chances_BR)
        assert len(seeds) == len(prompts), "a row of chances for each prompt"
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        batch = VllmBatch(self._started, slots=len(prompts))
        batch.add({row: Request(prompt, sampling, (seeds[row],)) for row, prompt in enumerate(prompts)})
        try:
            while batch.room < len(prompts):
                for new, logprob in batch.advance():
                    if new.finish == "failed":
                        raise RlhfError(
                            "the policy's log-probabilities are not finite; lower the learning rate or use float32"
                        )
                    tokens[new.key].append(new.token)
                    logprobs[new.key].append(logprob)
        finally:
            batch.abort(range(len(prompts)))
        return self._generation(tokens, logprobs)

    def open(self, slots: int) -> VllmBatch:
        """An empty running batch. While it holds rows, the engine takes no other batch and no `generate`.

        Raises ValueError for more slots than the engine has.
        """
        if slots > self._slots:
            raise ValueError(f"slots={slots} is more than the {self._slots} that the engine was started with")
        return VllmBatch(self._started, slots=slots)

    def sync(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over the policy's weights. Raises RuntimeError naming those that do not fit; none is taken then."""
        _check_weights(state_dict, self._started.skeleton)
        with turn(self._device):
            self._started.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state_dict.items())})

    def close(self) -> None:
        """Give the memory back; neither the engine nor a batch of it can be used after this."""
        stop_vllm(self._started.llm)
        del self._started
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _generation(self, tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> Generation:
        lengths_B = torch.tensor([len(row) for row in tokens])
        response_BR = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True, padding_value=self._pad_id)
        logprobs_BR = pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True)
        mask_BR = torch.arange(response_BR.shape[1]) < lengths_B[:, None]
        ended_B = torch.tensor([row[-1] == self._started.eos_id for row in tokens])
        to = self._device
        return Generation(response_BR.to(to), mask_BR.to(to), logprobs_BR.to(to), ended_B.to(to))


def _drawn_seeds(rows: int, generator: torch.Generator | None) -> list[int]:
    device = "cpu" if generator is None else generator.device
    seeds: list[int] = torch.randint(2**63 - 1, (rows,), generator=generator, device=device).tolist()
    return seeds


def _seeds_of(chances_BR: Tensor) -> list[int]:
    """A seed for each row: all 53 random bits of its first number."""
    seeds: list[int] = (chances_BR[:, 0].double() * 2**53).long().tolist()
    return seeds


def _skeleton(directory: Path) -> PreTrainedModel:
    """The model without its weights."""
    config, stored = open_config(directory)
    return build_skeleton(AutoModelForCausalLM, config, stored, directory / CONFIG)


def _read_weights(directory: Path, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights, mapped into memory. What else lies in their files is passed over, as transformers does."""
    stored = {name: tensor for file in weight_files(directory) for name, tensor in load_file(file).items()}
    for name, source in skeleton.all_tied_weights_keys.items():
        if source in stored:
            stored.setdefault(name, stored[source])  # vLLM unties what it reloads
    return {name: stored[name] for name in skeleton.state_dict() if name in stored}


def _check_weights(weights: Mapping[str, Tensor], skeleton: PreTrainedModel) -> None:
    """RuntimeError unless these are the skeleton's weights. vLLM itself would keep old values for a missing one."""
    wanted = skeleton.state_dict()
    kinds = {
        "missing": wanted.keys() - weights.keys(),
        "unknown": weights.keys() - wanted.keys(),
        "of another shape": {
            name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape
        },
    }
    problems = [f"{kind}: {', '.join(sorted(names)[:3])}" for kind, names in kinds.items() if names]
    if problems:
        raise RuntimeError(f"the weights do not fit the model: {'; '.join(problems)}")
