"""Lists as OpenAI's clients page through them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmill.types import JSON

__all__ = ["listed"]


def listed(items: Sequence[JSON], has_more: bool) -> JSON:
    """A page of objects."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
