"""Bodies of ``POST /v1/responses`` and ``POST /v1/responses/compact``.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.batches import Metadata
from tokenmill.server.schemas.request import Generation, Int, JsonSchema, Strict, unsupported
from tokenmill.types import JSON, SamplingParams, StructuredOutput

__all__ = ["CompactRequest", "ResponsesRequest"]

LOGPROBS = "message.output_text.logprobs"

Positive = Annotated[int, Field(ge=1, lt=2**31)]


class _Open(Strict):
    """An object whose other fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True)


class FunctionTool(_Open):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def shown(self) -> JSON:
        """As chat templates know it."""
        function: JSON = {"name": self.name, "parameters": self.parameters or {"type": "object"}}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class NamedTool(_Open):
    """A function by its name."""

    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """Only some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class TextFormat(JsonSchema):
    """What the text must be. The fields beside the type are those of a schema."""

    type: Literal["text", "json_object", "json_schema"]

    def structured(self) -> StructuredOutput | None:
        """As the engine takes it."""
        if self.type == "json_object":
            return StructuredOutput(json_object=True)
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise RequestError("missing_parameter", "text.format.schema is missing.", "text.format.schema")
        return StructuredOutput(json_schema=json.dumps(self.json_schema, ensure_ascii=False))


class TextConfig(Strict):
    """``text``."""

    format: TextFormat | None = None
    verbosity: Any = None


class ReasoningConfig(_Open):
    """``reasoning``: the effort goes to the chat template; thoughts are given as they are, never summarized."""

    effort: str | None = None


class _Conversation(Strict):
    """What the model is shown."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None

    @property
    def shown_tools(self) -> list[JSON]:
        """The tools as chat templates know them."""
        return [tool.shown for tool in self.tools or ()]

    def check(self) -> None:
        super().check()
        if self.input in (None, []) and self.previous_response_id is None:
            raise RequestError("missing_parameter", "There is nothing to answer; send input.", "input")


class ResponsesRequest(_Conversation, Generation):
    """Body of ``POST /v1/responses``."""

    max_output_tokens: Positive | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    background: bool | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    # Without effect here: about tools and a platform that are not here.
    max_tool_calls: Any = None
    prompt_cache_options: Any = None

    # Not supported: asked for, they are refused.
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None

    def check(self) -> None:
        super().check()
        self.refuse("conversation", "prompt", "moderation", "prompt_logprobs")
        if self.context_management is not None:
            raise unsupported(
                "context_management", "context_management is not supported; call /v1/responses/compact instead."
            )
        if self.n not in (None, 1):
            raise unsupported("n", "A response is one answer; leave n out.")
        if self.max_tokens is not None:
            raise unsupported("max_tokens", "It is called max_output_tokens here.")
        if self.background and self.store is False:
            raise RequestError("invalid_parameter", "background needs store.", "background")
        if self.response_format is not None:
            raise unsupported("response_format", "It is called text.format here.")
        if not self.tools and self.tool_choice not in (None, "auto", "none"):
            raise RequestError("invalid_parameter", "tool_choice needs tools.", "tool_choice")
        known = {tool.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, AllowedTools):
            for index, tool in enumerate(self.tool_choice.tools):
                if tool.name not in known:
                    field = f"tool_choice.tools[{index}].name"
                    raise RequestError("unknown_tool", f"There is no tool {tool.name!r}.", field)

    def sampling_params(self) -> SamplingParams:
        """How to sample. Without a limit of its own, an answer may fill the context."""
        return self.sampling(
            max_tokens=self.max_output_tokens, logprobs=(self.top_logprobs or 0) if self.with_logprobs else None
        )

    def structured(self) -> StructuredOutput | None:
        other = super().structured()
        found = None if self.text is None or self.text.format is None else self.text.format.structured()
        if found is not None and other is not None:
            raise RequestError(
                "invalid_parameter", "text.format and vLLM's own fields cannot be asked for together.", "text.format"
            )
        return found or other

    @property
    def with_logprobs(self) -> bool:
        """Whether log probabilities are asked for."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    @property
    def format(self) -> JSON:
        """``text.format``."""
        given = self.text.format if self.text is not None else None
        return {"type": "text"} if given is None else given.model_dump(exclude_unset=True, by_alias=True)

    @property
    def callable_tools(self) -> list[JSON]:
        """The tools that may be called, as chat templates know them."""
        if isinstance(self.tool_choice, AllowedTools):
            allowed = {tool.name for tool in self.tool_choice.tools}
            return [tool.shown for tool in self.tools or () if tool.name in allowed]
        return self.shown_tools

    @property
    def chosen_tool(self) -> str | JSON:
        """``tool_choice`` in the form of chat completions."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return {"type": "function", "function": {"name": choice.name}}
        return choice.mode if isinstance(choice, AllowedTools) else choice or "auto"

    @property
    def variables(self) -> JSON:
        """What else the chat template reads."""
        effort = None if self.reasoning is None else self.reasoning.effort
        thinking: JSON = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return thinking | self.chat_template_kwargs

    def echo(self) -> JSON:
        """What a response repeats of its request."""
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {
                "effort": None if self.reasoning is None else self.reasoning.effort,
                "summary": None,
            },
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": self.format},
            "tool_choice": choice.model_dump() if isinstance(choice, Strict) else choice or "auto",
            "tools": [
                {"description": None, "parameters": None, "strict": None} | tool.model_dump(exclude_unset=True)
                for tool in self.tools or ()
            ],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }


class CompactRequest(_Conversation):
    """Body of ``POST /v1/responses/compact``."""

    token_budget: Positive | None = None
    """Tokens that the shorter conversation may have; None is half of the context."""
    tool_output_tokens: Annotated[int, Field(ge=16, lt=2**31)] = 256
    """Tokens that are left of an old tool output that is too long."""
    summary: Literal["extract", "model", "none"] = "extract"
    """What stands for what was dropped: its first sentences, a summary by the model, or only its size."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    # For a summary by the model
    priority: Int = 0
    cache_salt: str = ""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    user: str | None = None

    # Of OpenAI's platform; without effect here.
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None

    @property
    def stream(self) -> bool:
        """It is answered at once."""
        return False
