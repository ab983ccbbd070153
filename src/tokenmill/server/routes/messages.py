"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a conversation.

Source: https://docs.anthropic.com/en/api/messages, .../streaming, .../messages-count-tokens
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.errors import TokenmillError
from tokenmill.server.call import call_of
from tokenmill.server.conversation.conversations import cache_report
from tokenmill.server.conversation.dialogue import Dialogue, begin
from tokenmill.server.errors import anthropic_body_of
from tokenmill.server.generation import EventStream, check_output, last_outputs, until_disconnect
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.messages import CountTokensRequest, MessagesRequest
from tokenmill.server.schemas.request import parse
from tokenmill.server.service import service_of
from tokenmill.server.sse import event
from tokenmill.text.dialect import Content, Delta, Reasoning, ToolArguments, ToolCall
from tokenmill.types import JSON, CompletionOutput, FinishReason, RequestOutput, SamplingParams

ROUTER = APIRouter()


@ROUTER.post("/v1/messages", **documented(MessagesRequest))
async def messages(request: Request) -> Response:
    """Answers a conversation, at once or as a stream of named events."""
    service = service_of(request)
    body = parse(MessagesRequest, await request.body())
    model = service.check_model(body.model)
    shown, tools = body.shown_messages, body.shown_tools
    dialogue = await begin(
        service,
        shown,
        body.sampling_params(),
        tools=tools,
        tool_choice=body.chosen_tool,
        parallel=body.parallel,
        variables=body.variables,
    )
    answer_id = f"msg_{uuid.uuid4().hex}"
    context = {"messages": shown, "tools": tools, "variables": body.variables}
    call = call_of(request, body, model, answer_id, dialogue.prompt_token_ids, dialogue.params, context)
    outputs = service.generate(call)

    def reported(last: RequestOutput) -> JSON:
        return {"cache_report": cache_report(call, last)} if body.cache_report else {}

    head: JSON = {"id": answer_id, "type": "message", "role": "assistant", "model": model}
    if body.stream:
        return await EventStream.begin(request, _events(head, dialogue, outputs, reported), end=b"", failure=_failure)
    [output] = await until_disconnect(request.receive, last_outputs([outputs]))
    answer = head | _answer(dialogue, output) | reported(output)
    return Response(msgspec.json.encode(answer), media_type="application/json")


@ROUTER.post("/v1/messages/count_tokens", **documented(CountTokensRequest))
async def count_tokens(request: Request) -> JSON:
    """How many tokens the model would be shown."""
    service = service_of(request)
    body = parse(CountTokensRequest, await request.body())
    service.check_model(body.model)
    dialogue = await begin(
        service, body.shown_messages, SamplingParams(), tools=body.shown_tools, variables=body.variables
    )
    return {"input_tokens": len(dialogue.prompt_token_ids)}


def _answer(dialogue: Dialogue, output: RequestOutput) -> JSON:
    [completion] = output.outputs
    parsed = dialogue.split(completion.text)
    content: list[JSON] = []
    if parsed.reasoning:
        content.append({"type": "thinking", "thinking": parsed.reasoning, "signature": ""})
    if parsed.content or not parsed.tool_calls:
        content.append({"type": "text", "text": parsed.content})
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in parsed.tool_calls
    ]
    usage = _usage(output) | {"output_tokens": len(completion.token_ids)}
    return {"content": content, **_stop(completion, bool(parsed.tool_calls)), "usage": usage}


def _usage(output: RequestOutput) -> JSON:
    """Anthropic counts cached tokens beside the others, not among them."""
    return {
        "input_tokens": len(output.prompt_token_ids) - output.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": output.cached_tokens,
    }


def _stop(completion: CompletionOutput, calls: bool) -> JSON:
    sequence = completion.stop_reason if isinstance(completion.stop_reason, str) else None
    if completion.finish_reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif completion.finish_reason is FinishReason.CONTENT_FILTER:
        reason = "refusal"
    elif sequence is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


class _Blocks:
    """Turns deltas into the events of content blocks: one block is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._kind = ""
        self.calls = False

    def of(self, delta: Delta) -> Iterator[bytes]:
        match delta:
            case Content(text):
                yield from self._begin("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCall(_, call_id, name):
                self.calls = True
                yield from self.end()
                yield from self._begin("tool_use", {"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case ToolArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self) -> Iterator[bytes]:
        """Closes the block that is open, if one is."""
        if self._kind:
            self._kind = ""
            yield _event("content_block_stop", index=self._index)

    def _begin(self, kind: str, block: JSON) -> Iterator[bytes]:
        if self._kind != kind:
            yield from self.end()
            self._index += 1
            self._kind = kind
            yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: JSON) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


async def _events(
    head: JSON,
    dialogue: Dialogue,
    outputs: AsyncGenerator[RequestOutput, None],
    reported: Callable[[RequestOutput], JSON],
) -> AsyncGenerator[bytes, None]:
    parser, blocks = dialogue.parser(), _Blocks()
    generated = 0
    begun = False
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            usage = _usage(output)
            if not begun:
                begun = True
                open_ends: JSON = {"content": [], "stop_reason": None, "stop_sequence": None}
                yield _event("message_start", message=head | open_ends | {"usage": usage | {"output_tokens": 0}})
                yield _event("ping")
            [completion] = output.outputs
            check_output(completion)
            generated += len(completion.token_ids)
            deltas = parser.push(completion.text)
            if completion.finish_reason is not None:
                deltas += parser.finish()
            for delta in deltas:
                for data in blocks.of(delta):
                    yield data
            if completion.finish_reason is not None:
                for data in blocks.end():
                    yield data
                ending = _stop(completion, blocks.calls)
                yield _event(
                    "message_delta", delta=ending, usage=usage | {"output_tokens": generated}, **reported(output)
                )
                yield _event("message_stop")


def _event(kind: str, **fields: object) -> bytes:
    return event({"type": kind, **fields}, kind)


def _failure(error: TokenmillError) -> bytes:
    return event(anthropic_body_of(error), "error")
