"""What both engines begin with in `ppo_iteration`, and how trlX's summarize example scores.

A run of random weights: a policy, a reward model as the example has it, and posts with reference summaries. Every token
is one character, so that trlX's decoding and tokenising again changes nothing, and every character can be drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.checkpoint import StageDir
from rlhf.config import TinyModelConfig
from rlhf.environment import EnvironmentRow, write_environment
from rlhf.models import create_tiny_gptj, load_reward_model, reward_model_from_policy
from rlhf.prompt import TRLX_VERSION
from rlhf.scoring import Scorer

EOS, PAD, START = "<|endoftext|>", "<|pad|>", "<|startoftext|>"
TASK = "TL;DR:"
NEVER = -1e4
REFERENCES = "references.json"
BATCH = 2
"""Texts that the example gives the reward model at once, each of them twice."""


def character_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token a character, `size` in all: printable ASCII, ideographs, and at the end EOS, padding and the start."""
    special = [EOS, PAD, START]
    letters = [*map(chr, range(32, 127)), *map(chr, range(0x4E00, 0x4E00 + size - 95 - len(special)))]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD)


def endless_policy(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A GPT-J with random weights whose bias leaves every token but the special ones; it never ends by itself."""
    model = create_tiny_gptj(
        TinyModelConfig(layers=options.layers, hidden=options.hidden, heads=options.heads, rotary_dim=options.rotary),
        positions=options.positions,
        vocab_size=options.vocabulary,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=seed,
    )
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.all_special_ids] = NEVER
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(START)] = NEVER
    return model


def prepare(run_dir: Path, options: argparse.Namespace) -> None:
    """What PPO needs, reference summaries and their scores included, made from `options` alone."""
    tokenizer = character_tokenizer(options.vocabulary)
    with StageDir(run_dir, "sft").publish(1, final=True) as directory:
        endless_policy(options, tokenizer, seed=1).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    with StageDir(run_dir, "reward").publish(1, final=True) as directory:
        reward = reward_model_from_policy(run_dir / "sft" / "final", seed=2)
        # Read as the example does: after the start, at the last token before EOS.
        reward.config.prompt_version = TRLX_VERSION
        reward.config.score_prefix_ids = [tokenizer.convert_tokens_to_ids(START)]
        reward.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    texts = _posts(options)
    scorer = Scorer(load_reward_model(run_dir / "reward" / "final"), batch_tokens=4096)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in texts]
    references = [tokenizer(f"{prompt} {summary}")["input_ids"] for prompt, summary in texts.items()]
    scores = scorer.score(references).tolist()
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        rows = [
            EnvironmentRow(f"post-{number}", ids, 0, score)
            for number, (ids, score) in enumerate(zip(prompts, scores, strict=True))
        ]
        write_environment(directory, "train", rows[4:])
        write_environment(directory, "valid", rows[:4])
        (directory / REFERENCES).write_text(json.dumps(texts), encoding="utf-8")


def _posts(options: argparse.Namespace) -> dict[str, str]:
    """Reference summaries by prompt; prompts of four fifths to all of `--prompt` characters."""
    chances = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=chances).tolist()

    def text(length: int) -> str:
        return "".join(map(chr, draw(ord("a"), ord("z"), length)))

    found: dict[str, str] = {}
    for length in draw(4 * options.prompt // 5, options.prompt, 4 * options.rollouts + 4):
        found[text(length - len(TASK)) + TASK] = text(draw(options.response // 2, options.response - 1, 1)[0])
    return found


@dataclass
class ExampleScorer:
    """Scores as the example's reward function: padded to the maximum, each text twice, references again each time.

    In place of our Scorer under `rlhf.trlx.reward.RewardFunction`. The model is transformers' own, nothing of it
    changed. reference_scores are those by prompt of the last call; the example subtracts them, here the caller does
    with the same numbers, known beforehand.
    Source: CarperAI/trlx, examples/summarize_rlhf, trlx_gptj_text_summarization.py (get_scores, reward_fn) and
    reward_model/reward_model.py (GPTRewardModel.forward); 16-bit there, as its GPU allows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    references: Mapping[str, str]
    max_length: int
    reference_scores: dict[str, float] = field(default_factory=dict)

    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """One score a sequence of prompt and response: [B] float32."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
        prompts = [text.split(TASK)[0] + TASK for text in texts]
        scores_B = self._scores([f"{prompt} {self.references[prompt]}" for prompt in prompts])
        self.reference_scores = dict(zip(prompts, scores_B.tolist(), strict=True))
        return self._scores(texts)

    @torch.no_grad()
    def _scores(self, texts: Sequence[str]) -> Tensor:
        found: list[Tensor] = []
        for start in range(0, len(texts), BATCH):
            encoded = self.tokenizer(
                [START + text + EOS for text in texts[start : start + BATCH]],
                truncation=True,
                max_length=self.max_length,
                padding="max_length",
                return_tensors="pt",
            )
            ids_BT, mask_BT = encoded["input_ids"].repeat(2, 1), encoded["attention_mask"].repeat(2, 1)
            hidden_BTH = self.model.base_model(input_ids=ids_BT, attention_mask=mask_BT)[0]
            scores_BT = self.model.score(hidden_BTH).squeeze(-1)
            for row in range(len(ids_BT) // 2):
                ends = (ids_BT[row] == self.tokenizer.eos_token_id).nonzero()
                end = int(ends[0]) if len(ends) else ids_BT.shape[1]
                found.append(scores_BT[row, end - 1])
        return torch.stack(found)


def example_scorer(run_dir: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> ExampleScorer:
    """With the run's reward model and reference summaries."""
    model = AutoModelForSequenceClassification.from_pretrained(
        StageDir(run_dir, "reward").final(), attn_implementation="eager"
    )
    references = json.loads((StageDir(run_dir, "prepare").final() / REFERENCES).read_text(encoding="utf-8"))
    return ExampleScorer(model.eval(), tokenizer, references, max_length)
