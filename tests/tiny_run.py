"""A run whose fetch stage is done, small enough that every stage after it takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.checkpoint import StageDir
from rlhf.config import Config, TinyModelConfig
from rlhf.data import Comparison, Example, load_examples, write_jsonl
from rlhf.models import create_tiny_gptj, reward_model_from_policy
from rlhf.prompt import Post, encode_prompt
from rlhf.tokenizer import load_tokenizer

EOS, PAD = "<|endoftext|>", "<|pad|>"
THINGS = ("cat", "dog", "car", "house", "boss", "cake", "phone", "exam")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then EOS (256) and padding (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD)


def post(index: int) -> Post:
    thing = THINGS[index % len(THINGS)]
    return Post(subreddit="pets", title=f"my {thing}", body=f"I lost my {thing}" + " today" * (index % 5))


def examples(start: int, stop: int) -> list[Example]:
    return [Example(post(i), f"lost {THINGS[i % len(THINGS)]}", "writer") for i in range(start, stop)]


def comparisons(start: int, stop: int) -> list[Comparison]:
    """The good summary names the thing; every fourth judge errs; sources and margins alternate."""
    rows = []
    for i in range(start, stop):
        good, bad, wrong = f"lost {THINGS[i % len(THINGS)]}", "no idea what it is", i % 4 == 3
        chosen, rejected = (bad, good) if wrong else (good, bad)
        gold = {"gold_chosen": -1.0, "gold_rejected": 1.0} if wrong else {"gold_chosen": 1.0, "gold_rejected": -1.0}
        rows.append(Comparison(post(i), chosen, rejected, f"judge-{i % 2}", float(i % 3), gold))
    return rows


SHAPE = TinyModelConfig(layers=2, hidden=32, heads=2, rotary_dim=8, vocab_size=260)


def fetched_run(runs_dir: Path, shape: TinyModelConfig = SHAPE) -> Path:
    """A run directory in which `fetch` has finished, with a base model of this shape."""
    run_dir = runs_dir / "tiny"
    tokenizer = byte_tokenizer()
    with StageDir(run_dir, "fetch").publish(0, final=True) as directory:
        data = directory / "data"
        data.mkdir()
        write_jsonl(data / "posts-train.jsonl", (row.to_row() for row in examples(0, 26)))
        write_jsonl(data / "posts-valid.jsonl", (row.to_row() for row in examples(26, 36)))
        write_jsonl(data / "comparisons-train.jsonl", (row.to_row() for row in comparisons(0, 26)))
        write_jsonl(data / "comparisons-valid.jsonl", (row.to_row() for row in comparisons(26, 38)))
        model = create_tiny_gptj(
            shape,
            positions=128,
            vocab_size=260,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            seed=1,
        )
        model.save_pretrained(directory / "base")
        tokenizer.save_pretrained(directory / "base")
    return run_dir


def tiny_config(**changes: dict[str, Any]) -> Config:
    """Seven steps an epoch at four examples a step; `changes` add to sections, `sft={"max_steps": 3}` say."""
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 2}
    training = {"batch_size": 4, "micro_batch_size": 4, "optimizer": optimizer}
    sections: dict[str, dict[str, Any]] = {
        "prompt": {"max_prompt_tokens": 96, "max_response_tokens": 24},
        "runtime": {"device": "cpu", "log_every_steps": 1, "tensorboard": False},
        "sft": {**training, "rouge_posts": 4},
        "reward": {**training, "frozen_fraction": 0.5},
    }
    for section, values in changes.items():
        sections[section] = {**sections[section], **values}
    return Config.model_validate(sections)


def ready_for_ppo(runs_dir: Path, shape: TinyModelConfig = SHAPE) -> Path:
    """A run that has all that PPO needs: the base model stands for SFT, a fresh head for the reward model."""
    run_dir = fetched_run(runs_dir, shape)
    base = StageDir(run_dir, "fetch").final() / "base"
    tokenizer = load_tokenizer(base, key="base")
    for stage in ("sft", "reward"):
        with StageDir(run_dir, stage).publish(1, final=True) as directory:
            source = base if stage == "sft" else run_dir / "sft" / "final"
            if stage == "sft":
                for file in source.iterdir():
                    (directory / file.name).write_bytes(file.read_bytes())
            else:
                model = reward_model_from_policy(source, seed=5)
                model.save_pretrained(directory)
                tokenizer.save_pretrained(directory)
    data = StageDir(run_dir, "fetch").final() / "data"
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        for split in ("train", "valid"):
            rows = [
                {
                    "id": example.post.id,
                    "prompt_ids": encode_prompt(tokenizer, example.post, max_tokens=96).ids,
                    "cut_tokens": 0,
                    "reference_score": 0.25,
                }
                for example in load_examples(data, split)
            ]
            write_jsonl(directory / f"environment-{split}.jsonl", rows)
    return run_dir


def ppo_config(**ppo_settings: Any) -> Config:
    """Three iterations of eight rollouts, two inner epochs of two minibatches; and `ppo_settings`."""
    settings = {
        "iterations": 3,
        "unfrozen_layers": 1,
        "rollouts_per_iteration": 8,
        "rollout_chunk": 4,
        "inner_epochs": 2,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "eval_every_iterations": 2,
        "eval_posts": 4,
        "save_every_iterations": 1,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    } | ppo_settings
    return Config.model_validate(tiny_config().model_dump() | {"ppo": settings})
