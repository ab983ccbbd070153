"""Who asks, and what they may."""

from __future__ import annotations

import dataclasses

from starlette.requests import Request

__all__ = ["ANYONE", "NO_LIMITS", "SCOPES", "Limits", "Principal", "principal_of"]

SCOPES = frozenset({"inference", "admin", "metrics"})
"""What a key may be good for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a key may use; None is no limit.

    Those per minute fill up steadily and never hold more than one minute's worth. Those per day begin anew at midnight
    UTC. A request takes what it may need at most and gives back what it did not need when it ends.
    """

    requests_per_minute: int | None = None
    """Each prompt of a request to /v1/completions is one."""
    tokens_per_minute: int | None = None
    """Prompt and generated tokens together."""
    concurrency: int | None = None
    """Requests under way at once."""
    tokens_per_day: int | None = None
    dollars_per_day: float | None = None


NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Principal:
    """Whoever sent a request. The defaults are everybody's when the server asks for no keys."""

    key_id: str = ""
    """Public part of the key, for books and logs; empty without keys."""
    name: str = ""
    scopes: frozenset[str] = SCOPES
    models: frozenset[str] | None = None
    """Names it may ask for; None is every name."""
    priority: int = 0
    """Added to the priority that a request asks for."""
    limits: Limits = NO_LIMITS
    salt: str = ""
    """Goes before the cache salt of each request, so that nobody else hits its prefixes."""

    def may_use(self, model: str) -> bool:
        """Whether `model` is a name that it may ask for."""
        return self.models is None or model in self.models


ANYONE = Principal()


def principal_of(request: Request) -> Principal:
    """Who sent `request`: what the access middleware found, or `ANYONE` when it is not in use."""
    found = getattr(request.state, "principal", ANYONE)
    assert isinstance(found, Principal)
    return found
