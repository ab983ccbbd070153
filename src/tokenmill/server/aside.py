"""Where work on a text is done: the event loop serves others while a long one is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

__all__ = ["aside"]

T = TypeVar("T")

_LONG = 4096
"""Characters beyond which a thread takes less from the others than the work would."""


async def aside(length: int, work: Callable[[], T]) -> T:
    """Does `work` on a text of `length` characters: here when it is short, on a thread when it is long."""
    return await asyncio.to_thread(work) if length > _LONG else work()
