"""A server with a scripted engine behind it, and real clients in front."""

import asyncio
import contextlib
import dataclasses
import math
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import pytest
import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.events import Event
from tokenmill.llm import Health
from tokenmill.server.app import Server, create_app
from tokenmill.server.config import ServerConfig, StoreConfig
from tokenmill.server.connections.listener import address_of, bind
from tokenmill.server.observability.metrics import Metrics
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import (
    CompletionOutput,
    EngineStats,
    ErrorInfo,
    FinishReason,
    PoolingParams,
    RequestOutput,
    RequestStats,
    SamplingParams,
    TokenLogprobs,
)

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)


@dataclasses.dataclass
class Call:
    """What the server asked of the engine."""

    prompt: str | list[int]
    params: SamplingParams
    request_id: str
    priority: int
    cache_salt: str
    delta: bool
    tenant: str
    deadline: float | None
    pooling: PoolingParams | None


class ScriptedLLM:
    """Stands for `AsyncLLM`: answers every prompt with `pieces`, one token sequence per piece, in every completion.

    An embedding is how often a, b and c are in the text, and 1.
    """

    model_name = "scripted"
    config = EngineConfig()
    max_model_len = 2048

    def __init__(self, tokenizer: Tokenizer, stats: EngineStats) -> None:
        self.tokenizer = tokenizer
        self.stats = stats
        self.pooling = PoolingParams()
        self.pieces = ["Hel", "lo", " world"]
        self.finish = FinishReason.STOP
        self.refusal: Exception | None = None
        """Raised before the first output."""
        self.failure: Exception | ErrorInfo | None = None
        """Raised, or reported as finish reason, after the pieces."""
        self.endless = False
        """After the pieces, wait for ever."""
        self.state = Health(True, "", 0.5, 1, 2)
        self.calls: list[Call] = []
        self.ended: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        """Request ids in the order they ended, and whether they were given up."""

        self.decisions: list[Event] = []
        """What the engine tells about any request."""
        self.stats_of_request: list[RequestStats] = []
        """Sent with the last output."""

        self.drained = asyncio.Event()
        self.closed = self.refusing = False

    async def load(self) -> None:
        pass

    def refuse(self) -> None:
        self.refusing = True

    async def events(self, request_id: str = "") -> list[Event]:
        return self.decisions

    async def drain(self, timeout_s: float) -> None:
        await self.drained.wait()

    async def close(self) -> None:
        self.closed = True

    def health(self) -> Health:
        return self.state

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        delta: bool = False,
        tenant: str = "",
        deadline: float | None = None,
        pooling: PoolingParams | None = None,
    ) -> AsyncIterator[RequestOutput]:
        self.calls.append(Call(prompt, params, request_id, priority, cache_salt, delta, tenant, deadline, pooling))
        if self.refusal is not None:
            raise self.refusal
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        whole = [self._completion(index, "", params) for index in range(params.n)]
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=ids,
            outputs=whole,
            finished=False,
            cached_tokens=len(ids) // 2,
        )
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None] + [self._logprobs(token) for token in ids[1:]]
        given_up = True
        if pooling is not None:
            self._end(whole[0])
            output.embedding = self._embedding(ids, pooling)
            yield output
            return
        try:
            for number, piece in enumerate(self.pieces):
                for index in range(params.n):
                    new = self._completion(index, piece, params)
                    if number == len(self.pieces) - 1 and not self.endless:
                        self._end(new)
                        output.stats = self.stats_of_request
                    if delta:
                        output.outputs = [new]
                    else:
                        whole[index].text += new.text
                        whole[index].token_ids += new.token_ids
                        whole[index].finish_reason, whole[index].error = new.finish_reason, new.error
                        if new.logprobs:
                            whole[index].logprobs = (whole[index].logprobs or []) + new.logprobs
                    yield msgspec.structs.replace(output)
            if self.endless:
                await asyncio.Event().wait()
            given_up = False
        finally:
            self.ended.put_nowait((request_id, given_up))

    def _end(self, completion: CompletionOutput) -> None:
        if isinstance(self.failure, Exception):
            raise self.failure
        completion.finish_reason = self.finish
        if self.failure is not None:
            completion.finish_reason, completion.error = FinishReason.ERROR, self.failure

    def _embedding(self, ids: list[int], pooling: PoolingParams) -> "array[float]":
        text = self.tokenizer.decode(ids)
        numbers = [float(text.count(letter)) for letter in "abc"] + [1.0]
        length = math.hypot(*numbers) if pooling.normalize else 1.0
        return array("f", [number / length for number in numbers][: pooling.dimensions])

    def _completion(self, index: int, text: str, params: SamplingParams) -> CompletionOutput:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        logprobs = None if params.logprobs is None else [self._logprobs(token, params.logprobs) for token in ids]
        return CompletionOutput(index=index, text=text, token_ids=ids, logprobs=logprobs)

    def _logprobs(self, token: int, top: int = 1) -> TokenLogprobs:
        """The token at -0.5, and of `top` others the first at -0.25 and the rest impossible."""
        others = [token + 1 + i for i in range(top)]
        return TokenLogprobs([token, *others], [-0.5, *[-0.25, *[float("-inf")] * top][:top]], 2)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["Hello world, hello there"] * 4, trainer)
    return Tokenizer(backend, chat_template=TEMPLATE)


@pytest.fixture
def stats() -> EngineStats:
    return EngineStats(
        steps=7,
        last_progress=90.0,
        running=3,
        waiting=2,
        waiting_by_reason={"capacity": 2},
        blocks_total=100,
        blocks_used=25,
        blocks_cached=10,
        block_size=16,
        max_model_len=2048,
        prompt_tokens=1000,
        generation_tokens=200,
        prefix_queries=1000,
        prefix_hits=400,
        misses={"cold": 590, "evicted": 10},
        recomputed_tokens=32,
        padded_tokens=5,
        preemptions=1,
        finished={"stop": 4, "error": 1},
        step_tokens=48,
        step_seconds=0.02,
    )


@pytest.fixture
def llm(tokenizer: Tokenizer, stats: EngineStats) -> ScriptedLLM:
    return ScriptedLLM(tokenizer, stats)


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig(max_body_mib=0.01, store=StoreConfig(state=str(tmp_path / "state")))


@pytest.fixture
async def app(llm: ScriptedLLM, config: ServerConfig) -> AsyncIterator[FastAPI]:
    app = create_app(llm, config, Metrics("scripted"))  # type: ignore[arg-type]
    yield app
    await app.state.backlog.close()


@contextlib.asynccontextmanager
async def talk_to(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that talks to the app without a network."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@contextlib.asynccontextmanager
async def serving(app: FastAPI, config: ServerConfig) -> AsyncIterator[str]:
    """The app behind a real socket; yields its address."""
    with bind(config) as listener:
        server = Server(app, config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0)
        yield address_of(config, listener)
        server.should_exit = True
        await task


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with talk_to(app) as client:
        yield client


@pytest.fixture
def connect(llm: ScriptedLLM) -> Callable[[ServerConfig], contextlib.AbstractAsyncContextManager[httpx2.AsyncClient]]:
    """Makes a client of a server with other options."""

    def make(config: ServerConfig) -> contextlib.AbstractAsyncContextManager[httpx2.AsyncClient]:
        metrics = Metrics("scripted", observe=config.observe)
        return talk_to(create_app(llm, config, metrics))  # type: ignore[arg-type]

    return make


@pytest.fixture
async def url(app: FastAPI) -> AsyncIterator[str]:
    async with serving(app, ServerConfig(port=0)) as address:
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, which asks once."""
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def as_key(url: str) -> Callable[[str], openai.AsyncOpenAI]:
    """The official client with a key."""
    return lambda key: openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0)


@pytest.fixture
def chat_body() -> Callable[..., dict[str, Any]]:
    def make(**fields: Any) -> dict[str, Any]:
        return {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], **fields}

    return make
