"""/v1/responses: answers with typed items, kept so that a conversation goes on by id.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.batch.backlog import backlog_of
from tokenmill.server.call import call_of
from tokenmill.server.conversation.compaction import Compaction, compact, extract, steps_of
from tokenmill.server.conversation.conversations import cache_report
from tokenmill.server.conversation.dialogue import Dialogue, begin
from tokenmill.server.conversation.items import messages_of, normalized
from tokenmill.server.conversation.response_events import ResponseWriter
from tokenmill.server.conversation.responses import Making
from tokenmill.server.generation import EventStream, last_outputs, until_disconnect
from tokenmill.server.lists import listed
from tokenmill.server.openapi import documented
from tokenmill.server.principal import principal_of
from tokenmill.server.schemas.request import parse
from tokenmill.server.schemas.responses import CompactRequest, ResponsesRequest
from tokenmill.server.service import Service, service_of
from tokenmill.types import JSON, RequestOutput, SamplingParams

ROUTER = APIRouter()

_SUMMARIZE = (
    "Summarize the part of a conversation below for whoever goes on with it: what is asked for, what was found and "
    "done, and what is still open. Answer with the summary alone."
)


@ROUTER.post("/v1/responses", **documented(ResponsesRequest))
async def create_response(request: Request) -> Response:
    """Answers a conversation: at once, as a stream of typed events, or in the background."""
    service, responses = service_of(request), backlog_of(request).responses
    body = parse(ResponsesRequest, await request.body())
    if body.background:
        responses.check_kept("background")
    model = service.check_model(body.model)
    owner = principal_of(request).key_id
    before = await responses.history(body.previous_response_id, owner)
    items = before + normalized(body.input or [])
    dialogue = await _dialogue(service, body, items)
    response_id = f"resp_{uuid.uuid4().hex}"
    shown = messages_of(items, body.instructions)
    context = {"messages": shown, "tools": body.shown_tools, "metadata": body.metadata}
    call = call_of(request, body, model, response_id, dialogue.prompt_token_ids, dialogue.params, context)
    call.delta = True  # also for a whole answer, which adds up the same events
    head: JSON = {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "background": bool(body.background),
        "model": model,
        "store": body.store is not False and responses.keeps,
        **body.echo(),
    }

    def more(output: RequestOutput) -> JSON:
        return {"cache_report": cache_report(call, output)} if body.cache_report else {}

    writer = ResponseWriter(head, dialogue, service.llm.tokenizer, service.llm.stats.block_size, more)
    making = Making(writer, service.generate(call), owner, items, len(before))
    if body.background:
        run = await responses.launch(making)
        if not body.stream:
            return _json(writer.response)
        return _stream(request, run.follow(0))
    if body.stream:
        return await EventStream.begin(request, responses.stream(making), end=b"")
    return _json(await until_disconnect(request.receive, responses.finish(making)))


async def _dialogue(service: Service, body: ResponsesRequest, items: list[JSON]) -> Dialogue:
    """The prompt; with ``truncation: auto`` without as many of the oldest steps as do not fit."""
    params = body.sampling_params()
    longest = service.llm.max_model_len - (body.max_output_tokens or 1)
    steps = steps_of(items)

    async def without(dropped: int) -> Dialogue:
        oldest = [step for step in steps if not step.fixed][:dropped]
        shown = [item for step in steps if step not in oldest for item in step.items]
        return await begin(
            service,
            messages_of(shown, body.instructions),
            params,
            tools=body.callable_tools,
            tool_choice=body.chosen_tool,
            parallel=body.parallel_tool_calls is not False,
            structured=body.structured(),
            variables=body.variables,
        )

    dialogue = await without(0)
    if body.truncation != "auto" or len(dialogue.prompt_token_ids) <= longest:
        return dialogue
    too_few, enough = 0, sum(not step.fixed for step in steps)
    dialogue = await without(enough)  # if even this is too long, the engine says so
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        tried = await without(middle)
        if len(tried.prompt_token_ids) <= longest:
            enough, dialogue = middle, tried
        else:
            too_few = middle
    return dialogue


@ROUTER.get("/v1/responses/{response_id}", **documented(None, 400, 404, 503))
async def retrieve_response(
    request: Request,
    response_id: str,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """A response as it is now, or the events of one made in the background."""
    responses, owner = backlog_of(request).responses, principal_of(request).key_id
    if not stream:
        return _json(await responses.get(response_id, owner))
    after = -1 if starting_after is None else starting_after
    events = await responses.replay(response_id, owner, after)
    return _stream(request, events)


@ROUTER.delete("/v1/responses/{response_id}", **documented(None, 404, 503))
async def delete_response(request: Request, response_id: str) -> JSON:
    """Forgets a response."""
    await backlog_of(request).responses.delete(response_id, principal_of(request).key_id)
    return {"id": response_id, "object": "response", "deleted": True}


@ROUTER.post("/v1/responses/{response_id}/cancel", **documented(None, 400, 404, 503))
async def cancel_response(request: Request, response_id: str) -> Response:
    """Ends a response that is made in the background."""
    return _json(await backlog_of(request).responses.cancel(response_id, principal_of(request).key_id))


@ROUTER.get("/v1/responses/{response_id}/input_items", **documented(None, 400, 404, 503))
async def input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSON:
    """What the model was shown for a response, the newest first."""
    responses, owner = backlog_of(request).responses, principal_of(request).key_id
    return listed(*await responses.input_items(response_id, owner, after, limit, order))


@ROUTER.post("/v1/responses/compact", **documented(CompactRequest))
async def compact_response(request: Request) -> Response:
    """Replaces a long conversation by a shorter one, which is the input of the next request as it stands."""
    service, responses = service_of(request), backlog_of(request).responses
    body = parse(CompactRequest, await request.body())
    model = service.check_model(body.model)
    before = await responses.history(body.previous_response_id, principal_of(request).key_id)
    items = before + normalized(body.input or [])
    long_prompt = await _prompt(service, body, items)
    budget = body.token_budget or service.llm.max_model_len // 2
    around = len(long_prompt) - len(await _prompt(service, body, items, bare=True))
    plan = await asyncio.to_thread(
        compact, items, service.llm.tokenizer, max(1, budget - around), body.tool_output_tokens
    )
    share = plan.summary_tokens // max(1, len(plan.gaps))
    usage = {"input_tokens": 0, "cached_tokens": 0, "output_tokens": 0}
    summaries = [await _summary(request, body, model, gap, share, usage) for gap in plan.gaps]
    output = plan.items(summaries)
    short_prompt = await _prompt(service, body, output)
    return _json(
        {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": output,
            "usage": {
                "input_tokens": usage["input_tokens"],
                "input_tokens_details": {"cached_tokens": usage["cached_tokens"], "cache_write_tokens": 0},
                "output_tokens": usage["output_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["input_tokens"] + usage["output_tokens"],
            },
            "compaction": _account(plan, body, budget, long_prompt, short_prompt, service.llm.stats.block_size),
        }
    )


def _account(
    plan: Compaction, body: CompactRequest, budget: int, before: list[int], after: list[int], block_size: int
) -> JSON:
    """What a compaction saved and what it cost."""
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    return {
        "tokens_before": len(before),
        "tokens_after": len(after),
        "tokens_saved": len(before) - len(after),
        "token_budget": budget,
        "common_prefix_tokens": common,
        "cacheable_tokens": common // block_size * block_size,
        "dropped": {
            "items": [{"id": item["id"], "type": item["type"]} for gap in plan.gaps for item in gap],
            "reasoning_items": plan.reasoning_items,
        },
        "shortened_tool_outputs": plan.shortened,
        "summary": body.summary if plan.gaps else None,
    }


async def _prompt(service: Service, body: CompactRequest, items: list[JSON], bare: bool = False) -> list[int]:
    """Token ids of a conversation; `bare`, without what stays the same around it: instructions and tools."""
    dialogue = await begin(
        service,
        messages_of(items, None if bare else body.instructions),
        SamplingParams(),
        tools=() if bare else body.shown_tools,
        variables=body.chat_template_kwargs,
    )
    return dialogue.prompt_token_ids


async def _summary(
    request: Request, body: CompactRequest, model: str, gap: list[JSON], tokens: int, usage: dict[str, int]
) -> str:
    """What stands for a run of dropped items."""
    service = service_of(request)
    if body.summary == "none":
        return f"[Cut: {len(gap)} earlier items.]"
    if body.summary == "extract":
        return await asyncio.to_thread(extract, gap, service.llm.tokenizer, tokens)
    longest = service.llm.max_model_len - tokens
    text = await asyncio.to_thread(extract, gap, service.llm.tokenizer, longest // 2)
    dialogue = await begin(
        service, [{"role": "user", "content": f"{_SUMMARIZE}\n\n{text}"}], SamplingParams(max_tokens=tokens)
    )
    call = call_of(request, body, model, f"cmp_{uuid.uuid4().hex}", dialogue.prompt_token_ids, dialogue.params)
    [output] = await until_disconnect(request.receive, last_outputs([service.generate(call)]))
    usage["input_tokens"] += len(output.prompt_token_ids)
    usage["cached_tokens"] += output.cached_tokens
    usage["output_tokens"] += len(output.outputs[0].token_ids)
    said = dialogue.split(output.outputs[0].text).content.strip()
    return f"[Summary of {len(gap)} earlier items.]\n{said}"


def _stream(request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
    """A stream that begins at once, even if its first event is still to come."""
    return EventStream(b"", events, request.state.request_id, end=b"")


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
