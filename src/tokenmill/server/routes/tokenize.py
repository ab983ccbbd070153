"""POST /tokenize, /detokenize and /v1/chat/render: text to tokens and back, without the engine.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#tokenizer-api; its name for the last one is
``/v1/chat/completions/render``.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.errors import RequestError
from tokenmill.server.conversation.dialogue import begin
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.chat import ChatRequest
from tokenmill.server.schemas.request import parse
from tokenmill.server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from tokenmill.server.service import Service, service_of
from tokenmill.types import JSON, SamplingParams

ROUTER = APIRouter()


@ROUTER.post("/tokenize", **documented(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The tokens of a text or of a conversation."""
    service = service_of(request)
    body = parse(TokenizeRequest, await request.body())
    service.check_model(body.model)
    tokenizer = service.llm.tokenizer
    if body.prompt is None:
        tokens = await _tokens(service, body)
    else:
        tokens = await asyncio.to_thread(tokenizer.encode, body.prompt, body.add_special_tokens is not False)
    answer: JSON = {"count": len(tokens), "max_model_len": service.llm.max_model_len, "tokens": tokens}
    answer["token_strs"] = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return _json(answer)


@ROUTER.post("/detokenize", **documented(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of tokens, special ones included."""
    service = service_of(request)
    body = parse(DetokenizeRequest, await request.body())
    service.check_model(body.model)
    tokenizer = service.llm.tokenizer
    for index, token in enumerate(body.tokens):
        if not tokenizer.token_bytes(token):
            raise RequestError("invalid_token", f"The model has no token {token}.", f"tokens[{index}]")
    return _json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})


@ROUTER.post("/v1/chat/render", **documented(ChatRequest))
@ROUTER.post("/v1/chat/completions/render", **documented(ChatRequest))
async def render_chat(request: Request) -> Response:
    """The prompt that the same body would give the model at ``/v1/chat/completions``, as text and as tokens."""
    service = service_of(request)
    body = parse(ChatRequest, await request.body())
    model = service.check_model(body.model)
    tokens = await _tokens(service, body, tool_choice=body.chosen_tool)
    return _json(
        {
            "model": model,
            "prompt": service.llm.tokenizer.decode(tokens, skip_special_tokens=False),
            "token_ids": tokens,
            "count": len(tokens),
            "max_model_len": service.llm.max_model_len,
        }
    )


async def _tokens(service: Service, body: TokenizeRequest | ChatRequest, tool_choice: Any = None) -> list[int]:
    """The prompt that a chat makes of its messages."""
    dialogue = await begin(
        service,
        [message.model_dump(exclude_unset=True) for message in body.messages or ()],
        SamplingParams(),
        tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        tool_choice=tool_choice,
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs,
    )
    return dialogue.prompt_token_ids


def _json(answer: JSON) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
