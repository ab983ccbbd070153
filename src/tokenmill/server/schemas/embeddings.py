"""Body of ``POST /v1/embeddings``.

Source: https://platform.openai.com/docs/api-reference/embeddings/create
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.request import Int, Whole

__all__ = ["MOST_TEXTS", "EmbeddingRequest"]

MOST_TEXTS = 2048
"""Texts in one request, as many as OpenAI takes."""


class EmbeddingRequest(Whole):
    """Body of ``POST /v1/embeddings``."""

    input: str | list[str] | list[Int] | list[list[Int]]
    encoding_format: Literal["float", "base64"] = "float"
    """``base64`` is the numbers as float32, lowest byte first."""
    dimensions: Annotated[Int, Field(ge=1)] | None = None
    normalize: bool | None = None
    """Whether its length is 1; by default as the model's own files say (vLLM)."""

    def check(self) -> None:
        if not self.input:
            raise RequestError("empty_prompt", "There is nothing to embed; send at least one text.", "input")
        if len(self.inputs()) > MOST_TEXTS:
            raise RequestError("invalid_parameter", f"input holds more than {MOST_TEXTS} texts.", "input")

    def inputs(self) -> list[str | list[int]]:
        """The texts, one or several."""
        one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return cast("list[str | list[int]]", [self.input] if one else self.input)
