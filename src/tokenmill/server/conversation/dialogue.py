"""A conversation as the model sees it, and how to read its answer.

Chat completions, responses and messages differ in their wire formats only. What lies between is the same and is here:
messages and tools become a prompt, what tool_choice or a response format demands becomes a grammar, and the text of the
answer becomes typed deltas.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from tokenmill.server.aside import aside
from tokenmill.server.observability.record import current
from tokenmill.server.service import Service
from tokenmill.text.chat import render
from tokenmill.text.dialect import (
    AddedId,
    Chain,
    Delta,
    Parsed,
    Parser,
    ToolCall,
    gather,
    lark_json,
    lark_text,
)
from tokenmill.types import JSON, SamplingParams, StructuredOutput

__all__ = ["Dialogue", "begin"]

_TAIL = 256
"""Characters of the prompt's end that the parsers look at: its last line tells whether thoughts are open already."""


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A rendered conversation."""

    prompt_token_ids: list[int]
    params: SamplingParams
    """How to sample, with the grammar that the request asks for."""
    dialects: Chain
    tools: Sequence[Mapping[str, Any]]
    """What the model may call."""
    tail: str
    """End of the prompt's text."""

    def parser(self) -> Parser:
        """A parser for one completion of the prompt."""
        parser = self.dialects.parser(self.tools, self.tail)
        record = current()
        if not self.tools or record is None or record.on_parse is None:
            return parser
        return _Timed(parser, record.on_parse)

    def split(self, text: str) -> Parsed:
        """Reads a whole completion."""
        parser = self.parser()
        return gather([*parser.push(text), *parser.finish()])


class _Timed:
    """A parser that tells when it began and ended, and how many calls it read."""

    def __init__(self, parser: Parser, tell: Callable[[float, float, int], None]) -> None:
        self._parser = parser
        self._tell = tell
        self._begun = time.monotonic()
        self._calls = 0

    def push(self, text: str) -> list[Delta]:
        return self._counted(self._parser.push(text))

    def finish(self) -> list[Delta]:
        deltas = self._counted(self._parser.finish())
        self._tell(self._begun, time.monotonic(), self._calls)
        return deltas

    def _counted(self, deltas: list[Delta]) -> list[Delta]:
        self._calls += sum(isinstance(delta, ToolCall) for delta in deltas)
        return deltas


async def begin(
    service: Service,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    *,
    tools: Sequence[JSON] = (),
    tool_choice: Any = None,
    parallel: bool = True,
    structured: StructuredOutput | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> Dialogue:
    """Renders a conversation.

    Args:
        tools: functions in OpenAI's format.
        tool_choice: OpenAI's; None is "auto".
        parallel: whether the answer may hold several calls.
        structured: what the answer must be, after the model's thoughts; a call that `tool_choice` demands goes before.
        variables: what else the chat template reads.

    Raises:
        RequestError: from a content filter, the template (`tokenmill.text.chat.render`) or the choice of a tool
            (`tokenmill.text.dialect.Chain.grammar`).
    """
    tokenizer, dialects = service.llm.tokenizer, service.dialects
    messages = await service.filters.messages(messages)
    callable_tools = () if tool_choice == "none" else tools

    def prepare() -> tuple[str, list[int]]:
        text = render(tokenizer, messages, callable_tools, add_generation_prompt, **(variables or {}))
        return text, tokenizer.encode(text, add_special_tokens=False)

    text, token_ids = await aside(sum(len(str(message.get("content"))) for message in messages), prepare)
    tail = text[-_TAIL:]
    calls = dialects.grammar(tools, tool_choice, parallel, tokenizer.added_id, tail)
    if calls is not None:
        structured = StructuredOutput(grammar=calls)
    elif structured is not None:
        structured = _after_thoughts(structured, dialects, tokenizer.added_id, tail)
    if dialects.keeps_special_tokens:
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    return Dialogue(token_ids, msgspec.structs.replace(params, structured=structured), dialects, callable_tools, tail)


def _after_thoughts(structured: StructuredOutput, dialects: Chain, added_id: AddedId, tail: str) -> StructuredOutput:
    """The same demand on an answer that thoughts may precede. A grammar of the client's own is taken as it is."""
    if structured.grammar is not None or not any("reasoning" in dialect.kinds for dialect in dialects.dialects):
        return structured
    if structured.regex is not None:
        answer = f"/{structured.regex.replace('/', chr(92) + '/')}/"
    elif structured.choice is not None:
        answer = " | ".join(map(lark_text, structured.choice))
    else:
        try:
            schema = json.loads(structured.json_schema or '{"type": "object"}')
        except ValueError:
            schema = None
        if not isinstance(schema, dict):
            return structured  # is refused where grammars are compiled, with the reason
        answer = lark_json(schema)
    rules = dialects.reasoning_grammar(tail, added_id)
    return StructuredOutput(grammar=f"start: reasoning answer\n{rules}answer: {answer}\n")
