"""POST /v1/chat/completions.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.call import call_of
from tokenmill.server.generation import EventStream, Usage, check_output, last_outputs, until_disconnect
from tokenmill.server.logprobs import chat_logprobs, prompt_logprobs
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.chat import ChatRequest
from tokenmill.server.schemas.request import StreamOptions, parse
from tokenmill.server.service import service_of
from tokenmill.server.sse import Framer
from tokenmill.text.chat import encode_chat
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import JSON, CompletionOutput, RequestOutput

ROUTER = APIRouter()


@ROUTER.post("/v1/chat/completions", **documented(ChatRequest))
async def chat(request: Request) -> Response:
    """Answers a conversation, at once or as a stream of events."""
    service = service_of(request)
    body = parse(ChatRequest, await request.body())
    model = service.check_model(body.model)
    params = body.sampling_params()
    llm = service.llm
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    prompt = await asyncio.to_thread(  # a long conversation takes a while, and the event loop serves others
        lambda: encode_chat(
            llm.tokenizer, messages, body.shown_tools(), body.add_generation_prompt, **body.chat_template_kwargs
        )
    )
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    context = {"messages": messages, "tools": body.shown_tools()}
    outputs = service.generate(call_of(request, body, model, answer_id, prompt, params, context))
    head: JSON = {"id": answer_id, "created": int(time.time()), "model": model}
    if body.stream:
        framer = Framer(head | {"object": "chat.completion.chunk"})
        return await EventStream.begin(request, _events(framer, llm.tokenizer, outputs, body.usage_options))
    [output] = await until_disconnect(request.receive, last_outputs([outputs]))
    answer = head | {"object": "chat.completion"} | _answer(llm.tokenizer, output)
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _answer(tokenizer: Tokenizer, output: RequestOutput) -> JSON:
    usage = Usage()
    usage.add(0, output)
    choices = [
        _choice(completion)
        | {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        | {"logprobs": _logprobs(tokenizer, completion)}
        for completion in output.outputs
    ]
    answer: JSON = {"choices": choices, "usage": usage.to_json()}
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(tokenizer, output.prompt_logprobs)
    return answer


def _choice(completion: CompletionOutput) -> JSON:
    return {
        "index": completion.index,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _logprobs(tokenizer: Tokenizer, completion: CompletionOutput) -> JSON | None:
    return None if completion.logprobs is None else chat_logprobs(tokenizer, completion.logprobs)


async def _events(
    framer: Framer, tokenizer: Tokenizer, outputs: AsyncGenerator[RequestOutput, None], options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    """Per choice: the role, its content, its finish reason; at the end the usage, if asked for."""
    usage = Usage()
    begun: set[int] = set()

    def chunk(index: int, delta: JSON, **more: Any) -> bytes:
        choice: JSON = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return framer.event({"choices": [choice]} | usage.of_chunk(options))

    async with contextlib.aclosing(outputs):
        async for output in outputs:
            usage.add(0, output)
            for completion in output.outputs:
                check_output(completion)
                index = completion.index
                if index not in begun:
                    begun.add(index)
                    yield chunk(index, {"role": "assistant", "content": ""})
                if completion.text or completion.logprobs:
                    yield chunk(index, {"content": completion.text}, logprobs=_logprobs(tokenizer, completion))
                if completion.finish_reason is not None:
                    yield chunk(**_choice(completion), delta={})
    if options.include_usage:
        yield framer.event({"choices": [], "usage": usage.to_json()})
