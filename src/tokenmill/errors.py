"""Every error that tokenmill raises on purpose.

    TokenmillError                 has a stable `code`, a message that says what to do, and the field it is about
    ├── ConfigError                an option is unknown, malformed or contradicts another
    ├── ModelError                 a checkpoint is missing, unsupported, or does not match its description
    ├── RequestError               the caller's request cannot be served as it stands
    ├── UnavailableError           the request is fine but cannot be taken now
    ├── EngineError                the engine failed while it served the request
    └── MissingDependencyError     an optional package is needed for what was asked

Codes are part of the public interface: a code keeps its meaning, the words of a message may improve.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "EngineError",
    "MissingDependencyError",
    "ModelError",
    "RequestError",
    "TokenmillError",
    "UnavailableError",
    "did_you_mean",
]


class TokenmillError(Exception):
    """Base of the tree above.

    Args:
        code: stable snake_case identifier, for example ``prompt_too_long``.
        message: one or two sentences for a person: what is wrong and what to do.
        field: the option, parameter or tensor the error is about, if one is to blame.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field


class ConfigError(TokenmillError):
    """An option is unknown, malformed or contradicts another."""


class ModelError(TokenmillError):
    """A checkpoint is missing, unsupported, or does not match its description."""


class RequestError(TokenmillError):
    """The caller's request cannot be served as it stands."""


class UnavailableError(TokenmillError):
    """The request is fine but cannot be taken now.

    Args:
        retry_after_s: when it is worth asking again, as far as that can be known.
    """

    def __init__(self, code: str, message: str, field: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(code, message, field)
        self.retry_after_s = retry_after_s


class EngineError(TokenmillError):
    """The engine failed while it served the request."""


class MissingDependencyError(TokenmillError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            "missing_dependency",
            f"{purpose} needs the package {package!r}. Install it with: pip install 'tokenmill[{extra}]'",
            package,
        )


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Ends an error message about a misspelt `word`: the nearest choice if one is near, else all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
