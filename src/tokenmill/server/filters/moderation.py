"""Asks a moderation endpoint about prompts and answers, and refuses or ends what it flags.

An answer is asked about in sections of a fixed length, each with all that came before it, and a section goes out once
it has passed.

Source: https://platform.openai.com/docs/api-reference/moderations
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.errors import ConfigError, MissingDependencyError, UnavailableError
from tokenmill.server.config import FilterConfig
from tokenmill.server.filter import Blocked, Filter, TextFilter, refusal

if TYPE_CHECKING:
    import httpx2

__all__ = ["FILTER"]

_SECTION = 400
"""Characters of an answer that are asked about at once."""

_logger = logging.getLogger(__name__)


class _Sections:
    """One answer."""

    def __init__(self, moderation: _Moderation) -> None:
        self._moderation = moderation
        self._passed = ""
        self._held = ""

    async def push(self, text: str) -> str:
        self._held += text
        out = ""
        while len(self._held) >= _SECTION:
            section, self._held = self._held[:_SECTION], self._held[_SECTION:]
            out += await self._release(section, out)
        return out

    async def finish(self) -> str:
        return await self._release(self._held, "") if self._held else ""

    async def _release(self, section: str, out: str) -> str:
        try:
            flagged = await self._moderation.flags(self._passed + section)
        except UnavailableError:
            raise Blocked(out) from None
        if flagged:
            raise Blocked(out)
        self._passed += section
        return section


class _Moderation(Filter):
    def __init__(self, config: FilterConfig, client: httpx2.AsyncClient) -> None:
        self._config = config
        self._client = client

    async def text(self, text: str) -> str:
        if text and await self.flags(text):
            raise refusal("moderation", "it was flagged")
        return text

    def stream(self) -> TextFilter:
        return _Sections(self)

    async def flags(self, text: str) -> bool:
        """Whether the endpoint flags `text`.

        Raises:
            UnavailableError: ``moderation_unavailable`` when it does not answer and texts must not pass then.
        """
        try:
            async with asyncio.timeout(self._config.moderation_timeout_s):
                answer = await self._client.post(self._config.moderation_url, json={"input": text})
            answer.raise_for_status()
            return any(bool(result["flagged"]) for result in answer.json()["results"])
        except Exception as error:
            _logger.warning("the moderation endpoint failed: %s", type(error).__name__)
        if self._config.moderation_open:
            return False
        raise UnavailableError("moderation_unavailable", "The content cannot be checked now; ask again later.")


def FILTER(config: FilterConfig) -> Filter:
    """Makes the client.

    Raises:
        ConfigError: ``missing_option`` without an endpoint; ``file_unreadable`` for the key.
        MissingDependencyError: without httpx2.
    """
    if not config.moderation_url:
        raise ConfigError("missing_option", "The filter 'moderation' needs an endpoint.", "moderation_url")
    headers = {}
    if config.moderation_key_file:
        try:
            key = Path(config.moderation_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                "file_unreadable", f"{config.moderation_key_file} cannot be read.", "moderation_key_file"
            ) from None
        headers["authorization"] = f"Bearer {key}"
    try:
        import httpx2
    except ModuleNotFoundError:
        raise MissingDependencyError("httpx2", "The filter 'moderation'", "moderation") from None
    return _Moderation(config, httpx2.AsyncClient(headers=headers, timeout=config.moderation_timeout_s))
