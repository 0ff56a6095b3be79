"""The TL;DR format: parse, render, cut to length, encode, decode.

A model sees `SUBREDDIT: r/…\\nTITLE: …\\nPOST: …\\nTL;DR:`, then a space, the summary and EOS. Whoever
changes what is written here changes `PROMPT_VERSION`, which is saved with every model.
Reward models of trlX's summarize example read the same text after `<|startoftext|>`, written as plain text, and
up to EOS without it: `TRLX_VERSION`. Source: trlX at 3340c2f, examples/summarize_rlhf/reward_model/reward_model.py,
and `get_scores` in trlx_gptj_text_summarization.py beside it.
Tokens are always those of a fast tokenizer, without BOS; text that spells a special token stays text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_VERSION = "tldr-1"
TRLX_VERSION = "trlx-tldr-1"
REWARD_VERSIONS = (PROMPT_VERSION, TRLX_VERSION)
"""What a reward model's prompt_version may be; a policy's is PROMPT_VERSION."""
TRLX_START = "<|startoftext|>"
MARKER = "TL;DR:"

_PROMPT = re.compile(r"SUBREDDIT:([^\n]*)\nTITLE:([^\n]*)\nPOST:(.*)", re.DOTALL)
_SUBREDDIT_PREFIX = re.compile(r"^(?:\s*/?r/)*\s*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]")
_NEAR = 0.25
"""A newline, sentence or word is near when reaching it costs at most this share of what would fit."""


@dataclass(frozen=True)
class Post:
    """A post in canonical form, whatever it was made from.

    subreddit has no `r/`; title is one line and may be empty; body is stripped, ends in no `TL;DR:` line, and
    its newlines are `\\n`. Raises ValueError when the body is empty or the text is not Unicode.
    """

    subreddit: str
    title: str
    body: str

    def __post_init__(self) -> None:
        canonical = {
            "subreddit": _SUBREDDIT_PREFIX.sub("", " ".join(self.subreddit.split()), count=1),
            "title": re.sub(r"\s*\n\s*", " ", normalize_text(self.title)),
            "body": _without_marker(normalize_text(self.body)),
        }
        for name, text in canonical.items():
            object.__setattr__(self, name, text)
        if not self.body:
            raise ValueError("the post is empty")
        check_unicode(self.subreddit + self.title + self.body)

    @cached_property
    def id(self) -> str:
        """Hex sha256 of the rendered prompt in UTF-8."""
        return hashlib.sha256(render_prompt(self).encode()).hexdigest()


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a rendered prompt, and how many tokens the body lost to make it fit."""

    ids: list[int]
    cut_tokens: int


def parse_prompt(text: str) -> Post:
    """Read a prompt with or without its last line `TL;DR:` and the space after it.

    Raises ValueError saying which of `SUBREDDIT:`, `TITLE:`, `POST:` is missing, or that the post is empty.
    """
    match = _PROMPT.fullmatch(normalize_text(text))
    if match is None:
        raise ValueError(f"not a TL;DR prompt: {_first_missing(normalize_text(text))}")
    subreddit, title, body = match.groups()
    return Post(subreddit=subreddit, title=title, body=body)


def render_prompt(post: Post) -> str:
    """Write a post the way the model reads it; there is no space after `TL;DR:`."""
    return _render(post, post.body)


def parse_summary(text: str) -> str:
    """Drop a leading `TL;DR:` and outer whitespace; newlines become `\\n`."""
    text = normalize_text(text)
    while text.startswith(MARKER):
        text = text[len(MARKER) :].lstrip()
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, post: Post, *, max_tokens: int) -> EncodedPrompt:
    """Tokenise a prompt; only the body is cut, at a newline or a sentence's end where one is near.

    Raises ValueError when the header and `TL;DR:` leave no room for the body.
    """
    encoding = tokenizer(
        render_prompt(post),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    full_ids = encoding["input_ids"]
    if len(full_ids) <= max_tokens:
        return EncodedPrompt(ids=full_ids, cut_tokens=0)
    marker_tokens = len(encode_text(tokenizer, "\n" + MARKER))
    last_fitting = max_tokens - marker_tokens - 1
    fitting_end = encoding["offset_mapping"][last_fitting][1] if last_fitting >= 0 else 0
    end = fitting_end - len(_header(post))
    while end > 0 and (border := _border_before(post.body, end)) > 0:
        ids = encode_text(tokenizer, _render(post, post.body[:border].rstrip()))
        if len(ids) <= max_tokens:
            return EncodedPrompt(ids=ids, cut_tokens=len(full_ids) - len(ids))
        # Tokens need not be additive around the cut: give up a little more until it fits.
        end = min(border, end) - 1
    raise ValueError(f"the header leaves no room for the post in {max_tokens} tokens")


def encode_response(tokenizer: PreTrainedTokenizerBase, summary: str, *, max_tokens: int | None = None) -> list[int]:
    """Tokenise a space, the summary and EOS; a longer one is cut and still ends in EOS.

    Raises ValueError when max_tokens is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} leaves no room for EOS; give at least 1")
    ids = encode_text(tokenizer, " " + summary) if summary else []
    if max_tokens is not None:
        ids = ids[: max_tokens - 1]
    return [*ids, tokenizer.eos_token_id]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text before the first EOS, without padding, stripped, newlines as `\\n`; inverts `encode_response`."""
    kept = [int(token) for token in ids]
    if tokenizer.eos_token_id in kept:
        kept = kept[: kept.index(tokenizer.eos_token_id)]
    kept = [token for token in kept if token != tokenizer.pad_token_id]
    return normalize_text(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of plain text: no BOS or EOS added, none read out of the text."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoding["input_ids"]


def normalize_text(text: str) -> str:
    """Strip outer whitespace; newlines become `\\n`."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def check_unicode(text: str) -> None:
    """Raise ValueError for half a surrogate pair, which UTF-8 cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"invalid Unicode: a lone surrogate at character {error.start}") from None


def _render(post: Post, body: str) -> str:
    return f"{_header(post)}{body}\n{MARKER}"


def _header(post: Post) -> str:
    return f"SUBREDDIT: r/{post.subreddit}\nTITLE: {post.title}\nPOST: "


def _without_marker(body: str) -> str:
    """Drop `TL;DR:` lines at the end, so that both kinds of copies of a post have one id."""
    while body == MARKER or body.endswith("\n" + MARKER):
        body = body[: -len(MARKER)].rstrip()
    return body


def _first_missing(text: str) -> str:
    lines = text.split("\n", 2)
    for number, label in enumerate(("SUBREDDIT:", "TITLE:", "POST:")):
        if number >= len(lines) or not lines[number].startswith(label):
            return f"line {number + 1} does not begin with {label}"
    raise AssertionError("the three labels are there")


def _border_before(body: str, end: int) -> int:
    """Position of the last newline, sentence end or space near `end`, the first kind found; else `end`.

    A sentence's end may be one further, as 。 needs no space behind it.
    """
    nearest = int(end * (1 - _NEAR))
    if (newline := body.rfind("\n", nearest, end + 1)) > 0:
        return newline
    if sentence_ends := [match.end() for match in _SENTENCE_END.finditer(body, nearest, end + 1)]:
        return sentence_ends[-1]
    space = max(body.rfind(" ", nearest, end + 1), body.rfind("\t", nearest, end + 1))
    return space if space > 0 else end
