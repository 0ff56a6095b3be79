"""Packed training steps beside plain ones: `python -m tests.benchmarks.training`.

A step is forward, backward and AdamW on one micro-batch. The plain one is transformers' own GPT-J (eager attention)
over padded rows: for SFT with the loss that it computes from labels, for the reward model with chosen and rejected in
rows of their own. Both take turns in one process, on the same weights and sequences; losses and the norm of the
gradients are compared. On a CPU a time is the process's own CPU time, to which other programs add nothing; on a GPU it
is the clock's, once the device is idle. Of each the quickest counts. Memory is what tensors take at the fullest moment
of a forward and backward pass, beside weights and gradients.

A GPT-J-6B on a GPU: `--device cuda --dtype bfloat16 --layers 28 --hidden 4096 --heads 16 --rotary 64
--vocabulary 50400 --prompt 500 --response 50 --rows 8`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor
from torch.optim import AdamW
from transformers import GPTJForCausalLM, GPTJForSequenceClassification, PreTrainedModel

from rlhf.collate import EncodedExample, EncodedPair, TokenIds, pack_examples, pad_right, token_ids
from rlhf.gptj import use_fused_attention
from rlhf.losses import pairwise_divergent_loss, pairwise_last_loss
from rlhf.models import freeze_bottom, position_ids
from rlhf.pair_batches import PaddedPairs, pack_divergent, pack_pairs, pad_pairs
from rlhf.stages.reward import batch_scores
from rlhf.stages.sft import target_logprobs
from tests.benchmarks.plain_gptj import PAD_ID, plain_gptj, size_options
from tests.benchmarks.plan_traced import Counting

IGNORED = -100


@dataclass(frozen=True)
class Way:
    """One way to train: its copy of the model, and its loss."""

    model: PreTrainedModel
    loss: Callable[[], Tensor]


def draw(options: argparse.Namespace, mean: int, random: torch.Generator) -> list[TokenIds]:
    """Rows of 3/4 to 5/4 of the mean length, sorted as in training, where a batch has like lengths."""
    lengths = torch.randint(mean * 3 // 4, mean * 5 // 4 + 1, (options.rows,), generator=random)
    rows = [torch.randint(1, options.vocabulary, (n,), generator=random) for n in lengths.sort().values.tolist()]
    return [token_ids(row.tolist()) for row in rows]


def sft_ways(options: argparse.Namespace) -> dict[str, Way]:
    """SFT, with the loss on the summary."""
    plain, random = plain_gptj(options, GPTJForCausalLM).train(), torch.Generator().manual_seed(1)
    texts = zip(draw(options, options.prompt, random), draw(options, options.response, random), strict=True)
    examples = [EncodedExample("", prompt, response) for prompt, response in texts]
    batch = pack_examples(examples, loss_on="summary").to(options.device)
    ids_BT, mask_BT = pad_right([token_ids([*one.prompt, *one.response]) for one in examples], PAD_ID)
    labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
    for row, example in enumerate(examples):
        labels_BT[row, : len(example.prompt)] = IGNORED
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    inputs = {name: tensor.to(options.device) for name, tensor in inputs.items()}
    packed = fused_copy(plain)
    return {
        "plain": Way(plain, lambda: plain(**inputs, use_cache=False).loss),
        "packed": Way(packed, lambda: -target_logprobs(packed, batch).mean()),
    }


def reward_ways(options: argparse.Namespace) -> dict[str, Way]:
    """The reward model, with its lower blocks frozen, on the last scores."""
    plain, pairs = reward_model(options), draw_pairs(options)
    batch, padded = pack_pairs(pairs).to(options.device), pad_pairs(pairs, pad_id=PAD_ID).to(options.device)
    ends_B1 = padded.mask_BT.sum(dim=1, keepdim=True) - 1
    packed = fused_copy(plain)

    def packed_loss() -> Tensor:
        return pairwise_last_loss(*batch_scores(packed, batch).view(-1, 2).unbind(dim=1))

    def plain_loss() -> Tensor:
        return pairwise_last_loss(*plain_scores(plain, padded).gather(1, ends_B1).squeeze(1).chunk(2))

    return {"plain": Way(plain, plain_loss), "packed": Way(packed, packed_loss)}


def divergent_ways(options: argparse.Namespace) -> dict[str, Way]:
    """The same on the scores from the first difference on."""
    plain, pairs = reward_model(options), draw_pairs(options)
    batch = pack_divergent(pairs, pad_id=PAD_ID).to(options.device)
    padded = pad_pairs(pairs, pad_id=PAD_ID).to(options.device)
    packed = fused_copy(plain)

    def packed_loss() -> Tensor:
        scores_BR = batch_scores(packed, batch)[batch.read_BR]
        return pairwise_divergent_loss(*scores_BR.chunk(2), *batch.ids_BR.chunk(2), *batch.mask_BR.chunk(2))

    def plain_loss() -> Tensor:
        scores_BT = plain_scores(plain, padded)
        return pairwise_divergent_loss(*scores_BT.chunk(2), *padded.ids_BT.chunk(2), *padded.mask_BT.chunk(2))

    return {"plain": Way(plain, plain_loss), "packed": Way(packed, packed_loss)}


def reward_model(options: argparse.Namespace) -> PreTrainedModel:
    """Frozen as in the pipeline."""
    model = plain_gptj(options, GPTJForSequenceClassification).train()
    freeze_bottom(model, options.frozen)
    return model


def draw_pairs(options: argparse.Namespace) -> list[EncodedPair]:
    """Pairs of random tokens."""
    random = torch.Generator().manual_seed(1)
    texts = [draw(options, mean, random) for mean in (options.prompt, options.response, options.response)]
    return [EncodedPair("", *three) for three in zip(*texts, strict=True)]


def plain_scores(model: PreTrainedModel, pairs: PaddedPairs) -> Tensor:
    """scores_BT of transformers' own pass."""
    output = model.transformer(
        input_ids=pairs.ids_BT,
        attention_mask=pairs.mask_BT,
        position_ids=position_ids(pairs.mask_BT),
        use_cache=False,
    )
    return F.linear(output.last_hidden_state, model.score.weight).squeeze(-1)


def fused_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, as this project runs them."""
    copied = copy.deepcopy(model)
    use_fused_attention(copied)
    return copied


def seconds_of_step(way: Way, optimizer: AdamW, device: str) -> float:
    """Forward, backward and AdamW."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    way.loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def first_pass(way: Way) -> tuple[float, float, float]:
    """Loss, norm of the gradients, and MB of tensors at the fullest moment; gradients are there before."""
    for parameter in way.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Counting() as counting:
        loss = way.loss()
        loss.backward()
    norms = [p.grad.float().norm() for p in way.model.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm()), counting.most / 1e6


def compare(ways: dict[str, Way], options: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of both, and plain over packed."""
    found: dict[str, float] = {}
    for name, way in ways.items():
        found[f"{name}_loss"], found[f"{name}_gradient"], found[f"{name}_megabytes"] = first_pass(way)
    trained = {name: [p for p in way.model.parameters() if p.requires_grad] for name, way in ways.items()}
    optimizers = {name: AdamW(parameters, lr=1e-6, fused=True) for name, parameters in trained.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats + 1):  # the first is not counted
        for name, way in ways.items():
            times[name].append(seconds_of_step(way, optimizers[name], options.device))
    found |= {f"{name}_seconds": min(values[1:]) for name, values in times.items()}
    found["seconds_ratio"] = found["plain_seconds"] / found["packed_seconds"]
    found["megabytes_ratio"] = found["plain_megabytes"] / found["packed_megabytes"]
    return found


WAYS = {"sft": sft_ways, "reward": reward_ways, "divergent": divergent_ways}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = size_options("training", rows=8)
    options.add_argument("--frozen", type=float, default=0.7, help="share of the reward model's blocks")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print the numbers of SFT and of the reward model with either loss."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = {stage: compare(ways(options), options) for stage, ways in WAYS.items()}
    for stage, numbers in found.items():
        for name, value in numbers.items():
            print(f"{stage:<11}{name:<20}{value:>12.4f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
