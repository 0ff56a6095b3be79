"""A response that grows token by token, as text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf.prompt import decode_response

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are not a whole character; at the end of a text the rest of it may still come."""


class IncrementalText:
    """All pieces together are the text that `decode_response` makes of all tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """The whole characters that can be read since this token; often none."""
        self._ids.append(token)
        text = decode_response(self._tokenizer, self._ids)
        return "" if text.endswith(HALF_CHARACTER) else self._give(text)

    def rest(self) -> str:
        """What `add` held back, once no more tokens come: half a character stays one."""
        return self._give(decode_response(self._tokenizer, self._ids))

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
