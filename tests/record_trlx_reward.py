"""Record what trlX's own GPTRewardModel scores, into tests/trlx_reward_golden.json; no test runs this.

    python -m tests.record_trlx_reward CLONE TOKENIZER

CLONE is a clone of trlX at 3340c2f, whose examples/summarize_rlhf/reward_model/reward_model.py is run as it is, under
transformers 4.27.4 and tokenizers 0.13.3, of the time of trlX (setup.cfg: >=4.27.1); TOKENIZER is a directory where
`tests.tiny_run.byte_tokenizer` was saved by this project's own release. The texts are formatted and batched by the
statements of `get_scores` in examples/summarize_rlhf/trlx_gptj_text_summarization.py. float32 on a CPU.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from tests.trlx_checkpoints import CONFIG, reward_checkpoint

SEED = 3
EXAMPLE = "examples/summarize_rlhf/reward_model/reward_model.py"
GOLDEN = Path(__file__).with_name("trlx_reward_golden.json")
PROMPTS = (
    "SUBREDDIT: r/pets\nTITLE: my cat\nPOST: I lost my cat on the way to the station.\nTL;DR:",
    "SUBREDDIT: r/pets\nTITLE: my dog\nPOST: It ate 3 shoes. Twice!\nTL;DR:",
    "SUBREDDIT: r/cooking\nTITLE: ça brûle\nPOST: The cake was — how to say? — black.\n\nWhat now?\nTL;DR:",
)
SUMMARIES = ("lost my cat at the station", "the dog eats shoes", "I burnt a cake, what now?", "no", "é🙂")


def main(clone: str, tokenizer_dir: str) -> None:
    """Score every summary under every prompt and write the file."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{tokenizer_dir}/tokenizer.json", eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.pad_token = tokenizer.eos_token
    AutoTokenizer.from_pretrained = lambda name: tokenizer  # GPT-J's, which the class asks the Hub for
    model = reward_model(clone)
    pairs = [(prompt, summary) for prompt in PROMPTS for summary in SUMMARIES]
    rows = [
        {"prompt": prompt, "summary": summary, "score": score(model, tokenizer, f"{prompt} {summary}")}
        for prompt, summary in pairs
    ]
    GOLDEN.write_text(json.dumps({"seed": SEED, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def reward_model(clone: str) -> Any:
    """trlX's class with the weights of the seed, every one of which it must know."""
    with tempfile.TemporaryDirectory() as folder:
        GPTJForCausalLM(
            GPTJConfig(**{key: CONFIG[key] for key in CONFIG if key.startswith(("n_", "rot", "voc"))})
        ).save_pretrained(folder)
        model = runpy.run_path(f"{clone}/{EXAMPLE}")["GPTRewardModel"](folder)
    model.load_state_dict(reward_checkpoint(seed=SEED), strict=True)
    return model.float().eval()


def score(model: Any, tokenizer: Any, text: str) -> float:
    """One sample's score, formatted, padded and doubled as the example does."""
    encoded = tokenizer(
        ["<|startoftext|>" + text + "<|endoftext|>"],
        truncation=True,
        max_length=200,
        padding="max_length",
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model(
            input_ids=encoded["input_ids"].repeat(2, 1), attention_mask=encoded["attention_mask"].repeat(2, 1)
        )
    return float(output["chosen_end_scores"])


if __name__ == "__main__":
    main(*sys.argv[1:])
