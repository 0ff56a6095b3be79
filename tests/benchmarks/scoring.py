"""What scoring costs: `python -m tests.benchmarks.scoring`.

The same sequences by the Scorer, by transformers' GPT-J on batches padded to their longest, and as trlX's example has
it: padded to the maximum, each twice, and the post's reference anew for every summary. CPU seconds of one thread, the
best of some rounds, taken in turn in one process, so that the ratios hold however busy the machine is.

Source: CarperAI/trlx, examples/summarize_rlhf/trlx_gptj_text_summarization.py, get_scores and reward_fn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForSequenceClassification, PreTrainedModel

from rlhf.gptj import use_fused_attention
from rlhf.scoring import Scorer

MAX_TOKENS, CHUNK, TRLX_CHUNK, PAD_ID = 160, 16, 2, 1
PROMPT_TOKENS, SUMMARY_TOKENS = 90, 48
CASES = {"distinct prompts": 1, "pairs": 2, "4 candidates": 4}


@dataclass(frozen=True)
class Costs:
    """CPU seconds for the same scores, and the largest difference between the Scorer's and the padded ones."""

    sequences: int
    scorer: float
    padded: float
    trlx: float
    difference: float

    @property
    def over_padded(self) -> float:
        """How many times cheaper than batches padded to their longest."""
        return self.padded / self.scorer

    @property
    def over_trlx(self) -> float:
        """How many times cheaper than trlX's way."""
        return self.trlx / self.scorer


def models(*, layers: int, hidden: int, vocabulary: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random reward model as transformers has it and as we do."""
    config = GPTJConfig(
        vocab_size=vocabulary,
        n_positions=MAX_TOKENS,
        n_embd=hidden,
        n_layer=layers,
        n_head=8,
        rotary_dim=hidden // 8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=PAD_ID,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    eager = GPTJForSequenceClassification(config).eval()
    ours = GPTJForSequenceClassification(config).eval()
    ours.load_state_dict(eager.state_dict())
    use_fused_attention(ours)
    return eager, ours


def texts(posts: int, candidates: int, *, vocabulary: int) -> list[list[list[int]]]:
    """For each post its prompt with every candidate, the reference last; lengths vary by a quarter."""
    chance = torch.Generator().manual_seed(posts)

    def tokens(about: int) -> list[int]:
        length = int(torch.randint(about * 3 // 4, about * 5 // 4 + 1, (), generator=chance))
        return torch.randint(2, vocabulary, (min(length, MAX_TOKENS - PROMPT_TOKENS),), generator=chance).tolist()

    prompts = [tokens(PROMPT_TOKENS)[: MAX_TOKENS - SUMMARY_TOKENS * 5 // 4] for _ in range(posts)]
    return [[[*prompt, *tokens(SUMMARY_TOKENS)] for _ in range(candidates + 1)] for prompt in prompts]


@torch.no_grad()
def padded_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """In chunks as they come, padded to the longest."""
    chunks = [sequences[start : start + CHUNK] for start in range(0, len(sequences), CHUNK)]
    return torch.cat([_logits(model, chunk, max(map(len, chunk))) for chunk in chunks])


@torch.no_grad()
def trlx_scores(model: PreTrainedModel, of_posts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Each summary's score less its reference's."""
    summaries = [ids for post in of_posts for ids in post[:-1]]
    references = [post[-1] for post in of_posts for _ in post[:-1]]

    def scores(sequences: Sequence[Sequence[int]]) -> Tensor:
        chunks = [sequences[start : start + TRLX_CHUNK] for start in range(0, len(sequences), TRLX_CHUNK)]
        return torch.cat([_logits(model, [*chunk, *chunk], MAX_TOKENS)[: len(chunk)] for chunk in chunks])

    return scores(summaries) - scores(references)


def _logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]], width: int) -> Tensor:
    """transformers finds each row's last token by the pad id."""
    ids_BT = torch.tensor([[*ids, *[PAD_ID] * (width - len(ids))] for ids in sequences])
    logits_B1: Tensor = model(input_ids=ids_BT, attention_mask=(ids_BT != PAD_ID).long()).logits
    return logits_B1[:, 0]


def measure(case: str, *, posts: int, layers: int, hidden: int, vocabulary: int, rounds: int) -> Costs:
    """The three ways in turn, `rounds` times, and the best of each."""
    eager, ours = models(layers=layers, hidden=hidden, vocabulary=vocabulary)
    of_posts = texts(posts, CASES[case], vocabulary=vocabulary)
    wanted = [ids for post in of_posts for ids in post[:-1]]
    scorer = Scorer(ours, batch_tokens=16384)
    ways: dict[str, Callable[[], Tensor]] = {
        "scorer": lambda: scorer.score(wanted),
        "padded": lambda: padded_scores(eager, wanted),
        "trlx": lambda: trlx_scores(eager, of_posts),
    }
    difference = float((ways["scorer"]() - ways["padded"]()).abs().max())
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    return Costs(len(wanted), **best, difference=difference)


def main() -> None:
    """Measure and say it, as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        case: measure(
            case, posts=options.sequences // each, layers=6, hidden=256, vocabulary=2048, rounds=options.rounds
        )
        for case, each in CASES.items()
    }
    if options.json:
        print(json.dumps({case: vars(costs) for case, costs in found.items()}, indent=1))
        return
    for case, costs in found.items():
        print(
            f"{case:18} {1000 * costs.scorer / costs.sequences:6.2f} ms a score; padded {costs.over_padded:4.2f}, "
            f"as trlX {costs.over_trlx:4.2f} times as much; scores differ by {costs.difference:.0e}"
        )


if __name__ == "__main__":
    main()
