"""Tokens to text while they arrive: whole characters only, and nothing that a stop string may still claim."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from tokenmill.text.tokenizer import Tokenizer

__all__ = ["Piece", "TextStream"]

_LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


class Piece(NamedTuple):
    """What some tokens brought."""

    text: str
    """Text that is certain now."""
    stop: str | None
    """The stop string that ended the text, if one did."""
    tokens: int
    """How many of the pushed tokens belong to the text: all, or those up to the one that completed the stop string."""


class TextStream:
    """Turns the tokens of one completion into text, piece by piece.

    However the tokens are split into pushes, the pieces add up to the same text: the bytes of all tokens read as UTF-8,
    cut at the first stop string. Each token costs the same, however long the text is.

    Args:
        tokenizer: whose tokens they are.
        prompt_token_ids: what stands before; a character begun there is finished here.
        stop: texts that end the completion; when several are completed by one token, the one that starts first counts.
        include_stop: keep the stop string in the text.
        skip_special_tokens: leave out tokens that control the model.
        min_tokens: stop strings do not count in the text of this many first tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._unchecked = min_tokens
        self._at_start = not prompt_token_ids
        self._held = ""
        self._stopped = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._utf8.decode(self._last_bytes(prompt_token_ids))

    def push(self, token_ids: Sequence[int], final: bool) -> Piece:
        """Takes the next tokens and returns the text that is now certain.

        Args:
            token_ids: the next tokens, possibly none.
            final: no more will come, so nothing is held back. After that, or after a stop string, pushes bring nothing.
        """
        if self._stopped:
            return Piece("", None, 0)
        certain: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            text, stop = self._advance(self._utf8.decode(self._bytes(token_id)))
            certain.append(text)
            if stop is not None:
                return Piece("".join(certain), stop, count)
        if final:
            text, stop = self._advance(self._utf8.decode(b"", final=True))
            certain += [text, self._held]
            self._held, self._stopped = "", True
            return Piece("".join(certain), stop, len(token_ids))
        return Piece("".join(certain), None, len(token_ids))

    def _advance(self, new: str) -> tuple[str, str | None]:
        """Adds decoded characters; returns the text that is certain and the stop string that was completed."""
        if not self._stop:
            return new, None
        if self._unchecked > 0:
            self._unchecked -= 1
            return new, None
        text = self._held + new
        found = [(start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            start, stop = min(found, key=lambda match: match[0])
            self._held, self._stopped = "", True
            return text[: start + len(stop) if self._include_stop else start], stop
        hold = self._undecided(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest_stop - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special and self._tokenizer.is_special(token_id):
            return b""
        data = self._tokenizer.token_bytes(token_id)
        if self._at_start and data:
            self._at_start = False
            return self._tokenizer.strip_start(data)
        return data

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """Enough bytes from the end of the prompt to hold a character that it leaves unfinished."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= _LONGEST_CHARACTER or self._tokenizer.is_special(token_id):
                break
            tail = self._tokenizer.token_bytes(token_id) + tail
        return tail
