"""Who asks, and what they may."""

from __future__ import annotations

import dataclasses

from starlette.requests import Request

__all__ = ["ANYONE", "Limits", "Principal", "principal_of"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a key may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and generated tokens together."""
    concurrency: int | None = None
    """Requests under way at once."""
    tokens_per_day: int | None = None
    dollars_per_day: float | None = None


@dataclasses.dataclass(frozen=True)
class Principal:
    """Whoever sent a request. The defaults are everybody's when the server asks for no keys."""

    key_id: str = ""
    """Public part of the key, for books and logs; empty without keys."""
    name: str = ""
    scopes: frozenset[str] = frozenset({"inference", "admin", "metrics"})
    models: frozenset[str] | None = None
    """Names it may ask for; None is every name."""
    priority: int = 0
    """Added to the priority that a request asks for."""
    limits: Limits = Limits()
    salt: str = ""
    """Goes before the cache salt of each request, so that nobody else hits its prefixes."""


ANYONE = Principal()


def principal_of(request: Request) -> Principal:
    """Who sent `request`: what the access middleware found, or `ANYONE` when it is not in use."""
    found = getattr(request.state, "principal", ANYONE)
    assert isinstance(found, Principal)
    return found
