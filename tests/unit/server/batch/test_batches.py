"""/v1/batches through the official client."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import msgspec
import openai
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenmill.errors import EngineError, RequestError, UnavailableError
from tokenmill.server.app import create_app
from tokenmill.server.batch import batches as batches_module
from tokenmill.server.batch.batch_lines import Journal, Usage
from tokenmill.server.batch.batches import PRIORITY
from tokenmill.server.config import ServerConfig
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.principal import Principal
from tokenmill.server.tenancy.tenants import Tenants

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _no_live_traffic(llm: Any, stats: Any) -> None:
    llm.stats = _replaced(stats, waiting=0)


def _replaced(stats: Any, waiting: int) -> Any:
    return msgspec.structs.replace(stats, waiting=waiting)


def lines(count: int, url: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return [{"custom_id": f"c{i}", "method": "POST", "url": url, "body": body} for i in range(count)]


async def uploaded(client: openai.AsyncOpenAI, entries: list[Any]) -> str:
    data = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries).encode()
    return (await client.files.create(file=("in.jsonl", data), purpose="batch")).id


async def begun(client: openai.AsyncOpenAI, entries: list[Any], endpoint: Any = CHAT, **fields: Any) -> Any:
    file_id = await uploaded(client, entries)
    return await client.batches.create(
        input_file_id=file_id, endpoint=endpoint, completion_window=fields.pop("completion_window", "24h"), **fields
    )


async def ended(client: openai.AsyncOpenAI, batch: Any) -> Any:
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        batch = await client.batches.retrieve(batch.id)
    return batch


async def answers(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


async def test_every_line_is_answered_as_over_http(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, llm: Any
) -> None:
    batch = await begun(client, lines(5), metadata={"run": "7"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
    assert batch.expires_at == batch.created_at + 86400
    batch = await ended(client, batch)
    assert (batch.status, batch.metadata, batch.errors, batch.error_file_id) == ("completed", {"run": "7"}, None, None)
    assert batch.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    found = await answers(client, batch.output_file_id)
    assert sorted(entry["custom_id"] for entry in found) == [f"c{i}" for i in range(5)]
    live = (await http.post(CHAT, json=lines(1)[0]["body"])).json()
    for entry in found:
        assert (entry["error"], entry["response"]["status_code"]) == (None, 200)
        assert entry["response"]["request_id"]
        body = entry["response"]["body"]
        assert {**body, "id": "", "created": 0} == {**live, "id": "", "created": 0}
    assert batch.usage.total_tokens == 5 * live["usage"]["total_tokens"]
    assert {call.priority for call in llm.calls} == {PRIORITY, 0}
    kept = await client.files.retrieve(batch.output_file_id)
    assert (kept.purpose, kept.filename) == ("batch_output", f"{batch.id}_output.jsonl")


async def test_bad_requests_are_in_the_error_file_as_over_http(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    bad = [{"messages": 7}, {"messages": []}, {"unknown": 1}, {"model": "other", "messages": [{"role": "user"}]}]
    entries = lines(2) + [
        {"custom_id": f"bad{i}", "method": "POST", "url": CHAT, "body": body} for i, body in enumerate(bad)
    ]
    batch = await ended(client, await begun(client, entries))
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 6, "completed": 2, "failed": 4}
    found = {entry["custom_id"]: entry["response"] for entry in await answers(client, batch.error_file_id)}
    for i, body in enumerate(bad):
        live = await http.post(CHAT, json=body)
        assert (found[f"bad{i}"]["status_code"], found[f"bad{i}"]["body"]) == (live.status_code, live.json())


@pytest.mark.parametrize("field", ["stream", "background"])
async def test_a_line_cannot_be_a_stream(client: openai.AsyncOpenAI, field: str) -> None:
    batch = await ended(client, await begun(client, lines(1, **{field: True})))
    [entry] = await answers(client, batch.error_file_id)
    assert (entry["response"]["status_code"], entry["response"]["body"]["error"]["param"]) == (400, field)


async def test_completions_too(client: openai.AsyncOpenAI) -> None:
    entries = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["x", "y"]}}]
    batch = await ended(client, await begun(client, entries, "/v1/completions"))
    [entry] = await answers(client, batch.output_file_id)
    assert [choice["text"] for choice in entry["response"]["body"]["choices"]] == ["Hello world"] * 2


async def test_embeddings_too(client: openai.AsyncOpenAI, http: httpx2.AsyncClient) -> None:
    body = {"input": ["a", "b"]}
    entries = [{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}]
    batch = await ended(client, await begun(client, entries, "/v1/embeddings"))
    [entry] = await answers(client, batch.output_file_id)
    assert entry["response"]["body"]["data"] == (await http.post("/v1/embeddings", json=body)).json()["data"]
    assert batch.usage.input_tokens == entry["response"]["body"]["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("entries", "code", "line", "param"),
    [
        ([], "empty_file", None, None),
        (["{"], "invalid_json_line", 1, None),
        ([*lines(1), "", "[]"], "invalid_json_line", 3, None),
        (["[" * 100_000], "invalid_json_line", 1, None),
        ([*lines(1), *lines(1)], "duplicate_custom_id", 2, "custom_id"),
        ([{**lines(1)[0], "custom_id": ""}], "missing_parameter", 1, "custom_id"),
        ([{**lines(1)[0], "method": "GET"}], "invalid_method", 1, "method"),
        ([{**lines(1)[0], "url": "/v1/completions"}], "invalid_url", 1, "url"),
        ([{**lines(1)[0], "body": "x"}], "missing_parameter", 1, "body"),
    ],
)
async def test_a_file_that_is_not_one_of_requests_fails_with_its_line(
    client: openai.AsyncOpenAI, llm: Any, entries: list[Any], code: str, line: int | None, param: str | None
) -> None:
    batch = await ended(client, await begun(client, entries))
    assert (batch.status, batch.output_file_id, llm.calls) == ("failed", None, [])
    first = batch.errors.data[0]
    assert (first.code, first.line, first.param) == (code, line, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"more": 1}, "more"),
    ],
)
async def test_a_wrong_batch_is_refused_with_its_field(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    file_id = await uploaded(client, lines(1))
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
    answer = await http.post("/v1/batches", json=body)
    assert answer.status_code == (404 if param == "input_file_id" else 400)
    assert answer.json()["error"]["param"] == param


async def test_the_input_must_have_been_uploaded_for_it(client: openai.AsyncOpenAI) -> None:
    made = await client.files.create(file=("in", b"{}"), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.batches.create(input_file_id=made.id, endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


async def test_lists_are_paged_the_newest_first(client: openai.AsyncOpenAI) -> None:
    ids = [(await begun(client, lines(1))).id for _ in range(5)]
    assert [batch.id async for batch in client.batches.list(limit=2)] == ids[::-1]


async def test_lines_wait_while_live_requests_do(client: openai.AsyncOpenAI, llm: Any, stats: Any) -> None:
    llm.stats = _replaced(stats, waiting=1)
    batch = await begun(client, lines(3))
    while batch.status != "in_progress":
        batch = await client.batches.retrieve(batch.id)
    live = await client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "now"}])
    assert live.choices[0].message.content == "Hello world"
    assert [call.priority for call in llm.calls] == [0]
    llm.stats = _replaced(stats, waiting=0)
    assert (await ended(client, batch)).request_counts.completed == 3


async def test_only_so_many_lines_are_under_way(client: openai.AsyncOpenAI, llm: Any, config: ServerConfig) -> None:
    llm.endless = True
    batch = await begun(client, lines(50))
    while len(llm.calls) < config.keep.batch_concurrency:
        await client.batches.retrieve(batch.id)
    for _ in range(5):
        await client.batches.retrieve(batch.id)
    assert len(llm.calls) == config.keep.batch_concurrency


async def test_a_cancelled_batch_keeps_its_answers(client: openai.AsyncOpenAI, llm: Any) -> None:
    served = llm.generate

    async def generate(prompt: Any, params: Any, **fields: Any) -> AsyncIterator[Any]:
        llm.endless = len(llm.calls) >= 3
        async for output in served(prompt, params, **fields):
            yield output

    llm.generate = generate
    batch = await begun(client, lines(20))
    while batch.request_counts.completed < 3:
        batch = await client.batches.retrieve(batch.id)
    cancelled = await client.batches.cancel(batch.id)
    assert cancelled.status == "cancelling"
    batch = await ended(client, cancelled)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.total) == ("cancelled", 3, 20)
    assert len(await answers(client, batch.output_file_id)) == 3
    with pytest.raises(openai.BadRequestError) as caught:
        await client.batches.cancel(batch.id)
    assert caught.value.code == "invalid_state"


async def test_what_is_left_when_time_is_up_is_told_so(client: openai.AsyncOpenAI, llm: Any, app: FastAPI) -> None:
    llm.endless = True
    batch = await begun(client, lines(20))
    while not llm.calls:
        await client.batches.retrieve(batch.id)
    await app.state.backlog.batches.close()
    stored = app.state.backlog._state.get("batch", batch.id, "", "")
    app.state.backlog._state.update(batch.id, stored.body | {"expires_at": 1}, held=True)
    app.state.backlog._state.close()
    await app.state.backlog.start()
    batch = await ended(client, await client.batches.retrieve(batch.id))
    assert (batch.status, batch.request_counts.failed) == ("expired", 20)
    found = await answers(client, batch.error_file_id)
    assert {entry["error"]["code"] for entry in found} == {"batch_expired"}


@pytest.mark.parametrize(
    "refusal",
    [UnavailableError("starting", "Not yet."), RequestError("queue_full", "Too many."), EngineError("x", "x")],
)
async def test_a_line_that_cannot_be_taken_now_is_asked_again(
    client: openai.AsyncOpenAI, llm: Any, monkeypatch: Any, refusal: Exception
) -> None:
    monkeypatch.setattr(batches_module, "_AGAIN_S", 0.0)
    served, refused = llm.generate, []

    async def generate(prompt: Any, params: Any, **fields: Any) -> AsyncIterator[Any]:
        if len(refused) < 2:
            refused.append(fields)
            raise refusal
        async for output in served(prompt, params, **fields):
            yield output

    llm.generate = generate
    batch = await ended(client, await begun(client, lines(1)))
    assert (len(refused), batch.request_counts.completed) == (2, 1)


async def test_a_line_on_which_the_server_fails_is_given_up(
    client: openai.AsyncOpenAI, llm: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(batches_module, "_AGAIN_S", 0.0)
    llm.refusal = EngineError("engine_failed", "It failed.")
    batch = await ended(client, await begun(client, lines(1)))
    [entry] = await answers(client, batch.error_file_id)
    assert (entry["response"]["status_code"], entry["response"]["body"]["error"]["code"]) == (500, "engine_failed")


async def test_a_batch_goes_on_after_a_restart(llm: Any, config: ServerConfig) -> None:
    """The server is stopped in the middle twice; each request is answered once, whatever was under way."""
    count = 30
    served = llm.generate
    allowed = asyncio.Semaphore(11)

    async def generate(prompt: Any, params: Any, **fields: Any) -> AsyncIterator[Any]:
        await allowed.acquire()
        async for output in served(prompt, params, **fields):
            yield output

    llm.generate = generate
    batch_id = ""
    for round_ in range(3):
        app = create_app(llm, config, Metrics("scripted"))
        transport = httpx2.ASGITransport(app=app)
        http = httpx2.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(base_url="http://server/v1", api_key="x", http_client=http) as client:  # type: ignore[arg-type]
            await app.state.backlog.start()
            if not batch_id:
                batch_id = (await begun(client, lines(count))).id
            batch = await client.batches.retrieve(batch_id)
            if round_ == 2:
                for _ in range(count):
                    allowed.release()
                batch = await ended(client, batch)
                found = await answers(client, batch.output_file_id)
            else:
                while batch.request_counts.completed < 11 * (round_ + 1):
                    batch = await client.batches.retrieve(batch_id)
            await app.state.backlog.close()
        for _ in range(11):
            allowed.release()
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": count, "completed": count, "failed": 0}
    assert sorted(entry["custom_id"] for entry in found) == sorted(f"c{i}" for i in range(count))
    assert batch.usage.output_tokens == sum(e["response"]["body"]["usage"]["completion_tokens"] for e in found)


def test_a_torn_line_is_cut_off(tmp_path: Any) -> None:
    path = tmp_path / "out"
    journal = Journal(path, Usage())
    journal.append("a", {"body": {"usage": {"prompt_tokens": 3}}}, None)
    journal.append("b", None, {"code": "x"})
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n"), -7):
        path.write_bytes(whole[:cut])
        usage = Usage()
        again = Journal(path, usage)
        assert (again.custom_ids, again.count, usage.to_json()["input_tokens"]) == ({"a"}, 1, 3)
        again.append("b", None, {"code": "x"})
        again.close()
        assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == ["a", "b"]


class _Keys:
    """Stands for the access middleware: the key is the principal's id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"])[b"authorization"].decode().split()[1]
        scope["state"]["principal"] = Principal(key_id=key, priority=5, salt=f"salt of {key}")
        await self._app(scope, receive, send)


@pytest.fixture
def keyed(app: FastAPI) -> None:
    app.user_middleware.append(Middleware(_Keys))


@pytest.mark.usefixtures("keyed")
async def test_files_and_batches_belong_to_the_key_that_made_them(as_key: Any, llm: Any) -> None:
    async with as_key("anna") as anna, as_key("ben") as ben:
        batch = await ended(anna, await begun(anna, lines(2)))
        for asked, object_id in (
            (ben.files.retrieve, batch.input_file_id),
            (ben.files.content, batch.output_file_id),
            (ben.files.delete, batch.output_file_id),
            (ben.batches.retrieve, batch.id),
            (ben.batches.cancel, batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await asked(object_id)
        with pytest.raises(openai.NotFoundError) as caught:
            await ben.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        assert caught.value.param == "input_file_id"
        assert (await ben.files.list()).data == []
        assert (await ben.batches.list()).data == []
        assert len((await anna.files.list()).data) == 2
        # A line is run as its key: with its priority, salt and name.
        assert {(call.tenant, call.cache_salt, call.priority) for call in llm.calls} == {
            ("anna", "salt of anna", PRIORITY + 5)
        }


async def test_a_batch_ends_with_its_key(llm: Any, config: ServerConfig) -> None:
    """Keys, limits and names are those of the moment at which a line is run."""

    class Ring:
        revoked = False

        def recognize(self, secret: str) -> Principal:
            return Principal(key_id=secret)

        def current(self, principal: Principal) -> Principal | None:
            return None if self.revoked else Principal(key_id=principal.key_id, priority=3)

    ring = Ring()
    app = create_app(llm, config, Metrics("scripted"), Tenants(keyring=ring))  # type: ignore[arg-type]
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    async with openai.AsyncOpenAI(base_url="http://server/v1", api_key="anna", http_client=http) as client:  # type: ignore[arg-type]
        await ended(client, await begun(client, lines(1)))
        ring.revoked = True
        batch = await ended(client, await begun(client, lines(1)))
        [entry] = await answers(client, batch.error_file_id)
    assert [(call.tenant, call.priority) for call in llm.calls] == [("anna", PRIORITY + 3)]
    assert (entry["response"]["status_code"], entry["response"]["body"]["error"]["code"]) == (401, "invalid_api_key")
    await app.state.backlog.close()
