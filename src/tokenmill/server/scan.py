"""Finds patterns in a text that comes in pieces, and decides about a place only when no more text can change it.

The result is that of a scan of the whole text from left to right: at each place the first pattern that matches there is
replaced, and the scan goes on behind it. How the text was split into pieces makes no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import regex

__all__ = ["Pattern", "Scanner", "scan"]

_SENTINEL = "\U0010ffff"
"""A character that no text holds (a noncharacter). A pattern followed by it can match no text, but can still reach the
end of one: then more text might change what the pattern matches there."""

_CONTEXT = 256
"""Characters before a place that a pattern may look back at."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Something to find.

    Args:
        expression: in the syntax of the package regex.
        replace: gets what the expression matched, and returns how many of its characters are to be replaced, and by
            what: None ends the text here. Returns None when the match is none after all.
    """

    expression: str
    replace: Callable[[str], tuple[int, str | None] | None]

    def __post_init__(self) -> None:
        """Compiles; raises `regex.error` when the expression is wrong."""
        object.__setattr__(self, "compiled", regex.compile(self.expression))
        object.__setattr__(self, "open", regex.compile(f"(?:{self.expression}){_SENTINEL}"))

    compiled: regex.Pattern[str] = dataclasses.field(init=False)
    open: regex.Pattern[str] = dataclasses.field(init=False)
    """Matches partially wherever more text may change what the expression matches."""


class Scanner:
    """One text. Not used again after `finish`.

    Args:
        patterns: the earlier ones win where several match.
        timeout_s: how long one search may take.

    Raises:
        TimeoutError: from `push` and `finish`, when a search takes longer.
    """

    def __init__(self, patterns: Sequence[Pattern], timeout_s: float) -> None:
        self._patterns = patterns
        self._timeout_s = timeout_s
        self._text = ""
        self._at = 0
        """Where the undecided text begins; what stands before it is context."""
        self.stopped = False
        """Whether a pattern has ended the text."""

    def push(self, text: str) -> str:
        """Takes more text and returns what is decided by now."""
        self._text += text.replace(_SENTINEL, "")
        return self._advance(final=False)

    def finish(self) -> str:
        """Returns what was still undecided."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        out: list[str] = []
        undecided = [-1] * len(self._patterns)
        matches = [-1] * len(self._patterns)
        while self._at < len(self._text) and not self.stopped:
            limit = len(self._text)
            for number, pattern in enumerate(self._patterns):
                if not final:
                    limit = min(limit, self._next(undecided, number, pattern.open, partial=True))
            start = limit
            for number, pattern in enumerate(self._patterns):
                start = min(start, self._next(matches, number, pattern.compiled, partial=False))
            out.append(self._text[self._at : start])
            self._at = start
            if start == limit:
                break
            length, replacement = self._replacement()
            self.stopped = replacement is None
            out.append(replacement or "")
            self._at += length
        drop = max(0, self._at - _CONTEXT)
        self._text, self._at = self._text[drop:], self._at - drop
        return "".join(out)

    def _next(self, known: list[int], number: int, expression: regex.Pattern[str], partial: bool) -> int:
        """Where the expression next matches, or could: what is known from an earlier search, while it lies ahead."""
        if known[number] < self._at:
            found = expression.search(self._text, self._at, partial=partial, timeout=self._timeout_s)
            known[number] = len(self._text) if found is None else found.start()
        return known[number]

    def _replacement(self) -> tuple[int, str | None]:
        """How many characters from here on are replaced, and by what; one by itself when nothing is."""
        for pattern in self._patterns:
            found = pattern.compiled.match(self._text, self._at, timeout=self._timeout_s)
            if found is not None and found.end() > found.start():
                replaced = pattern.replace(found.group())
                if replaced is not None:
                    return replaced
        return 1, self._text[self._at]


def scan(text: str, patterns: Sequence[Pattern], timeout_s: float) -> str:
    """A whole text, as a `Scanner` would give it piece by piece."""
    scanner = Scanner(patterns, timeout_s)
    return scanner.push(text) + scanner.finish()
