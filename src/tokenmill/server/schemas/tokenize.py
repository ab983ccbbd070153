"""Bodies of ``POST /tokenize`` and ``/detokenize``.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#tokenizer-api
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.chat import Message, Tool, check_variables
from tokenmill.server.schemas.request import Int, Strict, unsupported

__all__ = ["DetokenizeRequest", "TokenizeRequest"]


class TokenizeRequest(Strict):
    """Body of ``POST /tokenize``: a text, or messages that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own to the text, as it does by default. Messages get those of the template."""
    return_token_strs: bool = False
    """Return each token's text as well."""
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("invalid_parameter", "Send one of prompt and messages.", "prompt")
        if self.messages is not None and self.add_special_tokens:
            raise unsupported("add_special_tokens", "The chat template writes the special tokens of messages.")
        check_variables(self.chat_template_kwargs)


class DetokenizeRequest(Strict):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Int]
