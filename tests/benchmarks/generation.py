"""Our generation beside transformers' `model.generate`: `python -m tests.benchmarks.generation`.

Both write greedy tokens for the same prompts in one process, in turns. What is compared with is transformers' own
GPT-J: eager attention, a dynamic cache, left-padded prompts. On a CPU a time is the process's own CPU time of one
thread, to which other programs add nothing; on a GPU it is the clock's, once the device is idle. Of each the quickest
counts. EOS never comes, so both write every token that they may; how many rows agree in every token is reported:
in float32 all should, in bfloat16 a near tie may fall either way.

A GPT-J-6B on a GPU: `--device cuda --dtype bfloat16 --layers 28 --hidden 4096 --heads 16 --rotary 64
--vocabulary 50400 --prompt 500 --response 50`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPTJForCausalLM

from rlhf.generation import BuiltinEngine
from rlhf.gptj import use_fused_attention
from rlhf.sampling import Sampling
from rlhf.sequences import left_pad
from tests.benchmarks.plain_gptj import PAD_ID, plain_gptj, size_options


def draw_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Prompts of 3/4 to 5/4 of the mean length."""
    chances = torch.Generator().manual_seed(1)
    shortest, longest = options.prompt * 3 // 4, options.prompt * 5 // 4
    lengths = torch.randint(shortest, longest + 1, (options.rows,), generator=chances).tolist()
    return [torch.randint(1, options.vocabulary, (length,), generator=chances).tolist() for length in lengths]


def seconds(work: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """What it took and what it gave."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    given = work().cpu()  # waits for the device
    return clock() - started, given


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The quickest of each, in seconds, and their ratio."""
    torch.set_num_threads(options.threads)
    theirs, ours = (
        plain_gptj(options, GPTJForCausalLM, spread=options.spread).eval(),
        plain_gptj(options, GPTJForCausalLM, spread=options.spread).eval(),
    )
    use_fused_attention(ours)
    ours.load_state_dict(theirs.state_dict())
    prompts, new = draw_prompts(options), options.response
    ids_BP, mask_BP = (tensor.to(options.device) for tensor in left_pad(prompts, PAD_ID))
    engine = BuiltinEngine(ours, eos_id=options.vocabulary, pad_id=PAD_ID)
    greedy = Sampling(max_new_tokens=new, temperature=0)

    def generate() -> Tensor:
        sequences_BT = theirs.generate(
            input_ids=ids_BP, attention_mask=mask_BP.long(), do_sample=False, max_new_tokens=new, pad_token_id=PAD_ID
        )
        return sequences_BT[:, ids_BP.shape[1] :]

    times: dict[str, list[float]] = {"transformers": [], "ours": [], "ours_first_token": []}
    for _ in range(options.repeats + 1):  # the first is not counted
        spent, expected_BR = seconds(generate, options.device)
        times["transformers"].append(spent)
        spent, tokens_BR = seconds(lambda: engine.generate(prompts, greedy).response_BR, options.device)
        times["ours"].append(spent)
        spent, _ = seconds(lambda: engine.generate(prompts, Sampling(1, temperature=0)).response_BR, options.device)
        times["ours_first_token"].append(spent)
    found = {f"{name}_seconds": min(values[1:]) for name, values in times.items()}
    found["rows_alike"] = float((tokens_BR == expected_BR).all(dim=1).float().mean())
    found["ratio"] = found["transformers_seconds"] / found["ours_seconds"]
    found["rows_per_second"] = options.rows / found["ours_seconds"]
    found["prompt_tokens"] = statistics.mean(map(len, prompts))
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = size_options("generation", rows=16)
    options.add_argument("--spread", type=float, default=0.1, help="deviation of the weights; larger, fewer ties")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print the numbers."""
    options = parser().parse_args(arguments)
    found = measure(options)
    for name, value in found.items():
        print(f"{name:<28}{value:>10.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
