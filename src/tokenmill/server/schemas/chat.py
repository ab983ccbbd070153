"""Body of ``POST /v1/chat/completions``.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.request import Generation, Int, Strict, unsupported
from tokenmill.types import JSON, SamplingParams

__all__ = ["ChatRequest", "Message", "Tool", "check_variables"]

_RESERVED_VARIABLES = frozenset({"tokenizer", "messages", "tools", "documents", "add_generation_prompt"})


def check_variables(variables: dict[str, Any]) -> None:
    """Refuses ``chat_template_kwargs`` that would replace what the template gets from elsewhere.

    Raises:
        RequestError: ``invalid_parameter``.
    """
    if reserved := _RESERVED_VARIABLES & variables.keys():
        raise RequestError(
            "invalid_parameter", f"chat_template_kwargs cannot set {min(reserved)}.", "chat_template_kwargs"
        )


class Message(Strict):
    """One message; what else it holds goes to the chat template as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Any = None


class Function(Strict):
    """What a tool does."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """One tool; shown to the model as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function


class FunctionChoice(Strict):
    """A function by its name."""

    name: str


class ToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionChoice


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # vLLM's own
    add_generation_prompt: bool = True
    include_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    # Without effect here: hints to OpenAI's models and platform.
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
        if self.tools is None and self.tool_choice not in (None, "auto", "none"):
            raise RequestError("invalid_parameter", "tool_choice needs tools.", "tool_choice")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("invalid_parameter", "top_logprobs needs logprobs: true.", "top_logprobs")
        check_variables(self.chat_template_kwargs)

    def sampling_params(self) -> SamplingParams:
        """How to sample. Without a limit of its own, an answer may fill the context."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=limit, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs)

    @property
    def chosen_tool(self) -> str | JSON:
        """``tool_choice`` as OpenAI writes it."""
        choice = self.tool_choice
        return choice.model_dump() if isinstance(choice, ToolChoice) else choice or "auto"
