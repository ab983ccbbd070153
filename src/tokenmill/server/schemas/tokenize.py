"""Bodies of ``POST /tokenize`` and ``/detokenize``.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#tokenizer-api
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.chat import Message, Tool, check_variables
from tokenmill.server.schemas.request import Int, Strict

__all__ = ["DetokenizeRequest", "TokenizeRequest"]


class TokenizeRequest(Strict):
    """Body of ``POST /tokenize``: a text, or messages that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own; yes for a text, no for messages, whose template writes them."""
    return_token_strs: bool = False
    """Return each token's text as well."""
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("invalid_parameter", "Send one of prompt and messages.", "prompt")
        check_variables(self.chat_template_kwargs)

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools as the template gets them."""
        return None if self.tools is None else [tool.model_dump(exclude_unset=True) for tool in self.tools]


class DetokenizeRequest(Strict):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Int]
