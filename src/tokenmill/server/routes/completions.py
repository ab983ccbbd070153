"""POST /v1/completions.

Source: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.call import call_of
from tokenmill.server.generation import EventStream, Usage, check_output, last_outputs, merge, until_disconnect
from tokenmill.server.logprobs import completion_logprobs, prompt_logprobs
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.completions import CompletionRequest
from tokenmill.server.schemas.request import parse
from tokenmill.server.service import service_of
from tokenmill.server.sse import Framer
from tokenmill.text.infill import infill
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import JSON, CompletionOutput, RequestOutput, SamplingParams, TokenLogprobs

ROUTER = APIRouter()


@ROUTER.post("/v1/completions", **documented(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continues one or several prompts, at once or as a stream of events."""
    service = service_of(request)
    body = parse(CompletionRequest, await request.body())
    model = service.check_model(body.model)
    params = body.sampling_params()
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    asked = [(prompt, params) for prompt in body.prompts()]
    if body.suffix is not None:
        asked = await asyncio.to_thread(_with_suffix, service.llm.tokenizer, body.suffix, asked)
    streams = [
        service.generate(call_of(request, body, model, f"{answer_id}-{number}", prompt, own))
        for number, (prompt, own) in enumerate(asked)
    ]
    writer = _Writer(service.llm.tokenizer, body, params.n)
    head: JSON = {
        "id": answer_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }
    if body.stream:
        return await EventStream.begin(request, writer.events(Framer(head), streams))
    outputs = await until_disconnect(request.receive, last_outputs(streams))
    return Response(msgspec.json.encode(head | writer.answer(outputs)), media_type="application/json")


_Asked = list[tuple[str | list[int], SamplingParams]]


def _with_suffix(tokenizer: Tokenizer, suffix: str, asked: _Asked) -> _Asked:
    """The prompts as the model was trained to fill in the middle, ending where it was trained to end."""
    filled: _Asked = []
    for prompt, params in asked:
        gap = infill(tokenizer, prompt, suffix)
        if not params.ignore_eos:
            params = msgspec.structs.replace(params, stop_token_ids=[*params.stop_token_ids, *gap.stop_token_ids])
        filled.append((gap.prompt_token_ids, params))
    return filled


class _Writer:
    """Writes outputs as choices. Choice ``prompt * n + index`` is completion ``index`` of that prompt."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionRequest, n: int) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._n = n
        self._usage = Usage()
        self._offsets: dict[int, int] = {}
        """Characters already described by log probabilities, by choice."""

    def answer(self, outputs: Sequence[RequestOutput]) -> JSON:
        """The whole answer from complete outputs."""
        choices = []
        for number, output in enumerate(outputs):
            self._usage.add(number, output, generated=not self._body.only_echo)
            for completion in output.outputs:
                choice = self._choice(number, output, completion)
                if self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
                choices.append(choice)
        return {"choices": choices, "usage": self._usage.to_json()}

    async def events(
        self, framer: Framer, streams: Sequence[AsyncGenerator[RequestOutput, None]]
    ) -> AsyncGenerator[bytes, None]:
        """Chunks from increments; at the end the usage, if asked for."""
        options = self._body.usage_options
        async with contextlib.aclosing(merge(streams)) as merged:
            async for number, output in merged:
                self._usage.add(number, output, generated=not self._body.only_echo)
                for completion in output.outputs:
                    check_output(completion)
                    choice = self._choice(number, output, completion)
                    if choice["text"] or choice["logprobs"] or completion.finish_reason is not None:
                        yield framer.event({"choices": [choice]} | self._usage.of_chunk(options))
        if options.include_usage:
            yield framer.event({"choices": [], "usage": self._usage.to_json()})

    def _choice(self, number: int, output: RequestOutput, completion: CompletionOutput) -> JSON:
        index = number * self._n + completion.index
        text, token_ids = completion.text, completion.token_ids
        logprobs: Sequence[TokenLogprobs | None] | None = completion.logprobs
        if self._body.only_echo:
            text, token_ids, logprobs = "", [], None if logprobs is None else []
        if self._body.echo and index not in self._offsets:
            text = self._prompt_text(number) + text
            if logprobs is not None:
                token_ids = [*output.prompt_token_ids, *token_ids]
                logprobs = [*(output.prompt_logprobs or [None] * len(output.prompt_token_ids)), *logprobs]
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, token_ids, logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _prompt_text(self, number: int) -> str:
        prompt = self._body.prompts()[number]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=False)

    def _logprobs(
        self, index: int, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None] | None
    ) -> JSON | None:
        offset = self._offsets.setdefault(index, 0)
        if not entries:
            return None
        logprobs = completion_logprobs(self._tokenizer, token_ids, entries, offset)
        self._offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return logprobs
