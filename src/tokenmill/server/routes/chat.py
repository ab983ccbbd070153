"""POST /v1/chat/completions.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.call import Call, call_of
from tokenmill.server.conversation.conversations import cache_report
from tokenmill.server.conversation.dialogue import Dialogue, begin
from tokenmill.server.generation import EventStream, Usage, check_output, last_outputs, until_disconnect
from tokenmill.server.logprobs import chat_logprobs, prompt_logprobs
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.chat import ChatRequest
from tokenmill.server.schemas.request import parse
from tokenmill.server.service import service_of
from tokenmill.server.sse import Framer
from tokenmill.text.dialect import Content, Delta, Parser, Reasoning, ToolArguments, ToolCall
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import JSON, CompletionOutput, FinishReason, RequestOutput

ROUTER = APIRouter()


@ROUTER.post("/v1/chat/completions", **documented(ChatRequest))
async def chat(request: Request) -> Response:
    """Answers a conversation, at once or as a stream of events."""
    service = service_of(request)
    body = parse(ChatRequest, await request.body())
    model = service.check_model(body.model)
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
    dialogue = await begin(
        service,
        messages,
        body.sampling_params(),
        tools=tools,
        tool_choice=body.chosen_tool,
        parallel=body.parallel_tool_calls is not False,
        structured=body.structured(),
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs,
    )
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    context = {
        "messages": messages,
        "tools": tools,
        "variables": body.chat_template_kwargs,
        "conversation": body.prompt_cache_key,
        "metadata": body.metadata,
    }
    call = call_of(request, body, model, answer_id, dialogue.prompt_token_ids, dialogue.params, context)
    outputs = service.generate(call)
    writer = _Writer(service.llm.tokenizer, dialogue, body, call)
    head: JSON = {
        "id": answer_id,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }
    if body.stream:
        framer = Framer(head | {"object": "chat.completion.chunk"})
        return await EventStream.begin(request, writer.events(framer, outputs))
    [output] = await until_disconnect(request.receive, last_outputs([outputs]))
    answer = head | {"object": "chat.completion"} | writer.answer(output)
    return Response(msgspec.json.encode(answer), media_type="application/json")


class _Writer:
    """Writes outputs as choices."""

    def __init__(self, tokenizer: Tokenizer, dialogue: Dialogue, body: ChatRequest, call: Call) -> None:
        self._tokenizer = tokenizer
        self._dialogue = dialogue
        self._include_reasoning = body.include_reasoning
        self._options = body.usage_options
        self._cache_report = body.cache_report
        self._call = call
        self._usage = Usage()
        self._parsers: dict[int, Parser] = {}
        self._calling: set[int] = set()
        """Choices that call a function."""

    def answer(self, output: RequestOutput) -> JSON:
        """The whole answer from a complete output."""
        self._usage.add(0, output)
        choices = [
            self._message(completion) | {"logprobs": self._logprobs(completion)} for completion in output.outputs
        ]
        answer: JSON = {"choices": choices, "usage": self._usage.to_json()}
        if output.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
        if self._cache_report:
            answer["cache_report"] = cache_report(self._call, output)
        return answer

    def _message(self, completion: CompletionOutput) -> JSON:
        parsed = self._dialogue.split(completion.text)
        message: JSON = {"role": "assistant", "content": parsed.content, "refusal": None}
        if parsed.tool_calls:
            self._calling.add(completion.index)
            message["content"] = parsed.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in parsed.tool_calls
            ]
        if parsed.reasoning:
            self._usage.reasoning(len(self._tokenizer.encode(parsed.reasoning, add_special_tokens=False)))
            if self._include_reasoning:
                message["reasoning_content"] = parsed.reasoning
        return self._ending(completion) | {"message": message}

    def _ending(self, completion: CompletionOutput) -> JSON:
        calls = completion.index in self._calling and completion.finish_reason is FinishReason.STOP
        return {
            "index": completion.index,
            "finish_reason": "tool_calls" if calls else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _logprobs(self, completion: CompletionOutput) -> JSON | None:
        return None if completion.logprobs is None else chat_logprobs(self._tokenizer, completion.logprobs)

    async def events(self, framer: Framer, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[bytes, None]:
        """Per choice: the role, its content, its finish reason; at the end the usage and more, if asked for."""
        last: RequestOutput | None = None

        def chunk(index: int, delta: JSON, **more: Any) -> bytes:
            choice: JSON = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
            return framer.event({"choices": [choice]} | self._usage.of_chunk(self._options))

        async with contextlib.aclosing(outputs):
            async for output in outputs:
                last = output
                self._usage.add(0, output)
                for completion in output.outputs:
                    check_output(completion)
                    index = completion.index
                    if index not in self._parsers:
                        self._parsers[index] = self._dialogue.parser()
                        yield chunk(index, {"role": "assistant", "content": ""})
                    logprobs = self._logprobs(completion)
                    pieces = self._pieces(completion)
                    if logprobs is not None and not pieces:
                        pieces = [{"content": ""}]  # their text is held back, but the tokens are told now
                    for piece in pieces:
                        yield chunk(index, piece, logprobs=logprobs)
                        logprobs = None
                    if completion.finish_reason is not None:
                        yield chunk(**self._ending(completion), delta={})
        more: JSON = {"usage": self._usage.to_json()} if self._options.include_usage else {}
        if self._cache_report and last is not None:
            more["cache_report"] = cache_report(self._call, last)
        if more:
            yield framer.event({"choices": []} | more)

    def _pieces(self, completion: CompletionOutput) -> list[JSON]:
        """What a completion adds to its message."""
        parser = self._parsers[completion.index]
        deltas = parser.push(completion.text)
        if completion.finish_reason is not None:
            deltas += parser.finish()
        return [piece for delta in deltas if (piece := self._piece(completion.index, delta))]

    def _piece(self, index: int, delta: Delta) -> JSON:
        match delta:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                self._usage.reasoning(len(self._tokenizer.encode(text, add_special_tokens=False)))
                return {"reasoning_content": text} if self._include_reasoning else {}
            case ToolCall(number, call_id, name):
                self._calling.add(index)
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": number, "id": call_id, "type": "function", "function": function}]}
            case ToolArguments(number, text):
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
