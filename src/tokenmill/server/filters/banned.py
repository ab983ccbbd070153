"""Refuses prompts and ends answers that hold what an operator has listed.

The file of ``banned_patterns`` has one regular expression per line, in the syntax of the package regex (``(?i)`` at the
beginning ignores case); empty lines and those that begin with ``#`` are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import regex

from tokenmill.errors import ConfigError
from tokenmill.server.aside import aside
from tokenmill.server.config import FilterConfig
from tokenmill.server.filter import Blocked, Filter, TextFilter, refusal
from tokenmill.server.scan import Pattern, Scanner

__all__ = ["FILTER"]

_TIMEOUT_S = 2.0
"""For one search. An expression that takes longer counts as found: what cannot be checked does not pass."""


class _Watch:
    """One answer."""

    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        self._scanner = Scanner(patterns, _TIMEOUT_S)

    async def push(self, text: str) -> str:
        return self._checked(lambda: self._scanner.push(text))

    async def finish(self) -> str:
        return self._checked(self._scanner.finish)

    def _checked(self, scan: Callable[[], str]) -> str:
        try:
            text = scan()
        except TimeoutError:
            raise Blocked from None
        if self._scanner.stopped:
            raise Blocked(text)
        return text


def _end(text: str) -> tuple[int, None]:
    return len(text), None


class _Banned(Filter):
    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        self._patterns = patterns

    async def text(self, text: str) -> str:
        found = await aside(len(text), lambda: self._holds(text))
        if found:
            raise refusal("banned", "it holds a banned pattern")
        return text

    def _holds(self, text: str) -> bool:
        try:
            return any(pattern.compiled.search(text, timeout=_TIMEOUT_S) for pattern in self._patterns)
        except TimeoutError:
            return True

    def stream(self) -> TextFilter:
        return _Watch(self._patterns)


def FILTER(config: FilterConfig) -> Filter:
    """Reads the patterns.

    Raises:
        ConfigError: ``missing_option``, ``file_unreadable``, or ``invalid_pattern`` with the number of the line.
    """
    if not config.banned_patterns:
        raise ConfigError("missing_option", "The filter 'banned' needs a file of patterns.", "banned_patterns")
    try:
        lines = Path(config.banned_patterns).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            "file_unreadable", f"{config.banned_patterns} cannot be read: {why}.", "banned_patterns"
        ) from None
    patterns = tuple(
        _pattern(line, f"{config.banned_patterns}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    )
    return _Banned(patterns)


def _pattern(line: str, where: str) -> Pattern:
    try:
        pattern = Pattern(line, _end)
    except regex.error as error:
        raise ConfigError("invalid_pattern", f"{where}: {error}.", "banned_patterns") from None
    if "|" in line and (
        "(?=" in line or "(?!" in line
    ):  # in pieces it could be decided before what it looks at is there
        raise ConfigError(
            "invalid_pattern", f"{where}: it has alternatives and looks ahead; give each its own line.",
            "banned_patterns",
        )  # fmt: skip
    if pattern.compiled.search(""):
        raise ConfigError("invalid_pattern", f"{where}: it is found in an empty text.", "banned_patterns")
    return pattern
