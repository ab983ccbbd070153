"""Body of ``POST /v1/messages`` and ``POST /v1/messages/count_tokens``.

Source: https://docs.anthropic.com/en/api/messages, .../messages-count-tokens
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tokenmill.errors import RequestError
from tokenmill.server.schemas.request import Int, Seconds, Strict, unsupported
from tokenmill.types import JSON, SamplingParams

__all__ = ["CountTokensRequest", "MessagesRequest"]


class _Open(Strict):
    """An object that may say more than is read here, as ``cache_control``."""

    model_config = ConfigDict(extra="allow", strict=True)


class TextBlock(_Open):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(_Open):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Open):
    """What a call brought."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(_Open):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Open):
    """Thoughts that only their author can read; they are left out."""

    type: Literal["redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class Message(Strict):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(_Open):
    """A function that the model may call."""

    type: str | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Strict):
    """Whether the model must call a function."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(_Open):
    """About the request."""

    user_id: str | None = None


class CountTokensRequest(Strict):
    """What the model is shown."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = None
    """Passed to the chat template as ``enable_thinking``; a budget is not kept."""

    # Of Anthropic's platform; without effect here.
    context_management: Any = None
    output_config: Any = None

    # Not supported: asked for, they are refused.
    mcp_servers: Any = None
    container: Any = None

    def check(self) -> None:
        for field in ("mcp_servers", "container"):
            if getattr(self, field):
                raise unsupported(field, f"{field} is not supported.")
        for index, tool in enumerate(self.tools or ()):
            if tool.type not in (None, "custom"):
                raise unsupported(f"tools[{index}].type", f"Tools of type {tool.type!r} are not supported.")
        choice = self.tool_choice
        if choice is not None and choice.type in ("any", "tool") and not self.tools:
            raise RequestError("invalid_parameter", "tool_choice needs tools.", "tool_choice")
        if choice is not None and choice.type == "tool" and choice.name is None:
            raise RequestError("missing_parameter", "tool_choice.name is missing.", "tool_choice.name")

    @property
    def shown_messages(self) -> list[JSON]:
        """The conversation in OpenAI's format, which chat templates are written for."""
        shown: list[JSON] = []
        if self.system is not None:
            shown.append({"role": "system", "content": _text(self.system)})
        for message in self.messages:
            if isinstance(message.content, str):
                shown.append({"role": message.role, "content": message.content})
            else:
                shown += _assistant(message.content) if message.role == "assistant" else _user(message)
        return shown

    @property
    def shown_tools(self) -> list[JSON]:
        """The tools in OpenAI's format."""
        tools: list[JSON] = []
        for tool in self.tools or ():
            function: JSON = {"name": tool.name, "parameters": tool.input_schema or {"type": "object"}}
            if tool.description is not None:
                function["description"] = tool.description
            tools.append({"type": "function", "function": function})
        return tools

    @property
    def chosen_tool(self) -> str | JSON:
        """``tool_choice`` as OpenAI writes it."""
        choice = self.tool_choice
        if choice is None:
            return "auto"
        if choice.type == "tool":
            return {"type": "function", "function": {"name": choice.name}}
        return {"any": "required"}.get(choice.type, choice.type)

    @property
    def parallel(self) -> bool:
        """Whether an answer may hold several calls."""
        return self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use

    @property
    def variables(self) -> JSON:
        """What else the chat template reads."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking.get("type") != "disabled"}


class MessagesRequest(CountTokensRequest):
    """A conversation to be answered."""

    max_tokens: Int
    stream: bool | None = None
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    metadata: Metadata | None = None
    service_tier: Any = None

    # Our own
    cache_salt: str = ""
    priority: Int = 0
    timeout_s: Seconds | None = None
    cache_report: bool = False

    @property
    def user(self) -> str | None:
        """Who is served."""
        return None if self.metadata is None else self.metadata.user_id

    def sampling_params(self) -> SamplingParams:
        """How to sample."""
        given: JSON = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "stop": self.stop_sequences,
        }
        return SamplingParams(
            max_tokens=self.max_tokens, **{name: value for name, value in given.items() if value is not None}
        )


def _text(content: str | list[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _assistant(blocks: list[Block]) -> list[JSON]:
    message: JSON = {"role": "assistant", "content": ""}
    calls = []
    for block in blocks:
        match block:
            case TextBlock():
                message["content"] += block.text
            case ThinkingBlock():
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
    return [message | {"tool_calls": calls} if calls else message]


def _user(message: Message) -> Iterator[JSON]:
    """A turn of the user's: each result of a call is a message of its own, texts that follow one another are one."""
    texts: list[str] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": message.role, "content": "\n".join(texts)}
                texts = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
        elif isinstance(block, TextBlock):
            texts.append(block.text)
    if texts:
        yield {"role": message.role, "content": "\n".join(texts)}
