"""From what callers send to token ids; every field that does not fit is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from app.problems import INVALID_REQUEST, ProblemError
from app.schemas import FieldProblem, PostInput, Truncation
from rlhf.prompt import EncodedPrompt, Post, encode_prompt, encode_response, parse_prompt, parse_summary

MAX_ERRORS = 100


class FieldErrors:
    """Collects what is wrong with fields, so that a caller learns of all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldProblem] = []

    def add(self, field: str, message: str) -> None:
        """This field is wrong."""
        if len(self._found) < MAX_ERRORS:
            self._found.append(FieldProblem(field=field, message=message))

    def check_count(self, field: str, count: int, most: int) -> None:
        """A request may hold so many of these."""
        if count > most:
            self.add(field, f"{count} {field} are more than {most}; send several requests")

    def check_timeout(self, seconds: float | None, most: float) -> None:
        """A caller may ask for less time than the service gives, not for more."""
        if seconds is not None and seconds > most:
            self.add("timeout_seconds", f"{seconds:g} is more than {most:g}")

    def raise_any(self) -> None:
        """End the request if any field was wrong."""
        if self._found:
            first = self._found[0]
            raise ProblemError(INVALID_REQUEST, f"{first.field}: {first.message}", errors=self._found)


def to_post(given: PostInput) -> Post:
    """A post from its parts or its raw text. Raises ValueError saying what is wrong."""
    if not isinstance(given, str):
        return Post(subreddit=given.subreddit, title=given.title, body=given.body)
    if given.lstrip().startswith("SUBREDDIT:"):
        return parse_prompt(given)
    return Post(subreddit="", title="", body=given)


def encode_posts(
    posts: Sequence[PostInput],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    truncation: Truncation,
    field: Callable[[int], str],
    errors: FieldErrors,
) -> list[EncodedPrompt]:
    """Prompts in the order given; for one that does not fit, an error under field(number) and an empty prompt."""
    return [
        _encode_post(given, tokenizer, max_tokens, truncation, field(number), errors)
        for number, given in enumerate(posts)
    ]


def _encode_post(
    given: PostInput,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    truncation: Truncation,
    field: str,
    errors: FieldErrors,
) -> EncodedPrompt:
    try:
        encoded = encode_prompt(tokenizer, to_post(given), max_tokens=max_tokens)
    except ValueError as error:
        errors.add(field, str(error))
        return EncodedPrompt([], 0)
    if encoded.cut_tokens and truncation == "error":
        whole = len(encoded.ids) + encoded.cut_tokens
        errors.add(
            field, f"the post has {whole} tokens and {max_tokens} fit; shorten it, or send truncation: body to cut it"
        )
    return encoded


def check_token_ids(
    ids: Sequence[int], *, vocabulary: int, max_tokens: int | None, field: str, errors: FieldErrors
) -> None:
    """A sequence that is in tokens already; one that the model cannot read is an error under `field`."""
    if (largest := max(ids)) >= vocabulary:
        errors.add(
            field, f"token id {largest} is outside the reward model's vocabulary of {vocabulary}; use its own tokenizer"
        )
    elif max_tokens is not None and len(ids) > max_tokens:
        errors.add(field, f"{len(ids)} tokens are more than the {max_tokens} that the reward model reads; cut them")


def encode_summary(
    summary: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None, field: str, errors: FieldErrors
) -> list[int]:
    """A summary, read as the data is, with its end-of-text token; one that does not fit is an error under `field`."""
    try:
        ids = encode_response(tokenizer, parse_summary(summary))
    except ValueError as error:
        errors.add(field, str(error))
        return []
    if max_tokens is not None and len(ids) > max_tokens:
        errors.add(field, f"the summary has {len(ids)} tokens and {max_tokens} fit beside the post; shorten it")
    return ids
