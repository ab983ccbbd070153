"""Body of ``POST /v1/batches``.

Source: https://platform.openai.com/docs/api-reference/batch/create
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.request import Strict

__all__ = ["BatchRequest", "Endpoint", "FileExpiry", "Metadata"]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
"""What the lines of a batch can ask."""

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

_UNITS = {"m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([mhd])")


class ExpiresAfter(Strict):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class FileExpiry(Strict):
    """The part of an upload that says when the file is deleted."""

    expires_after: ExpiresAfter


class BatchRequest(Strict):
    """Body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    """``24h`` as OpenAI's, or another number of minutes (m), hours (h) or days (d)."""
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> None:
        if _WINDOW.fullmatch(self.completion_window) is None:
            raise RequestError("invalid_parameter", "completion_window must be a time like '24h'.", "completion_window")

    @property
    def window_s(self) -> int:
        """``completion_window`` in seconds."""
        found = _WINDOW.fullmatch(self.completion_window)
        assert found is not None
        return int(found[1]) * _UNITS[found[2]]
