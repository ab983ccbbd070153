"""Body of ``POST /v1/chat/completions``.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.request import Generation, Int, Strict, unsupported
from tokenmill.types import SamplingParams

__all__ = ["ChatRequest", "Message", "Tool"]

_RESERVED_VARIABLES = frozenset({"tokenizer", "messages", "tools", "documents", "add_generation_prompt"})


class Message(Strict):
    """One message; what else it holds goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Any = None


class Tool(Strict):
    """One tool; shown to the model as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    function: dict[str, Any]


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None

    # vLLM's own
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    # Without effect here: hints to OpenAI's models and platform.
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None

    # Not supported: asked for, they are refused.
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    web_search_options: Any = None

    def check(self) -> None:
        super().check()
        self.refuse("functions", "function_call", "audio", "web_search_options")
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", "The only modality is text.")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise unsupported("response_format", "The only response_format is text.")
        if self.tool_choice not in (None, "auto", "none"):
            raise unsupported("tool_choice", "tool_choice can be 'auto' or 'none'.")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("invalid_parameter", "top_logprobs needs logprobs: true.", "top_logprobs")
        if reserved := _RESERVED_VARIABLES & self.chat_template_kwargs.keys():
            raise RequestError(
                "invalid_parameter", f"chat_template_kwargs cannot set {min(reserved)}.", "chat_template_kwargs"
            )

    def sampling_params(self) -> SamplingParams:
        """How to sample. Without a limit of its own, an answer may fill the context."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=limit, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs)

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools as the template gets them."""
        if self.tools is None or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]
