"""The first use of a model, so that no caller pays for it, and so that one that does not work is found out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from rlhf.errors import PrerequisiteError, RlhfError
from rlhf.generation import Engine
from rlhf.prompt import Post, encode_text, render_prompt
from rlhf.sampling import Sampling
from rlhf.scoring import Scorer
from rlhf.slots import Request

SHORT_PROMPT_TOKENS = 8
NEW_TOKENS = 2
"""The first comes of reading the prompt, the second of a step, and any further of another such step."""


def warm_up_policy(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, *, slots: int, max_prompt_tokens: int, max_new_tokens: int
) -> None:
    """Write a few tokens after a short prompt and the longest, sampled and greedily.

    Raises PrerequisiteError when the engine cannot, or its logits are not finite.
    """
    tokens = min(NEW_TOKENS, max_new_tokens)
    short, long = _prompts(tokenizer, most=max_prompt_tokens)
    with _refusing("the policy"):
        batch = engine.open(slots)
        for prompt, temperature in ((short, 1.0), (long, 0.0)):
            sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, temperature=temperature)
            news = batch.add({0: Request(prompt, sampling, seed=(0,))})
            while not any(new.finish for new in news):
                news = batch.step()
            if news[-1].finish == "failed":
                raise ValueError("its logits are not finite; train it again, or set APP_PRECISION=float32")


def warm_up_scorer(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
    """Score a short sequence and the longest.

    Raises PrerequisiteError when the scorer cannot, or a score is not finite.
    """
    with _refusing("the reward model"):
        scorer.score(_prompts(tokenizer, most=max_tokens))


@contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """Whatever fails at the first use would fail for every caller."""
    try:
        yield
    except (RlhfError, ValueError) as error:
        raise PrerequisiteError(f"{kind} fails at its first use: {error}") from error


def _prompts(tokenizer: PreTrainedTokenizerBase, *, most: int) -> tuple[list[int], list[int]]:
    """A prompt of few tokens and one of `most`."""
    post = Post(subreddit="pets", title="warming up", body="I lost my cat on the way to the station. " * most)
    ids = encode_text(tokenizer, render_prompt(post))
    return ids[: min(SHORT_PROMPT_TOKENS, most)], ids[:most]
