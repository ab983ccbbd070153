"""Limits and accounts as clients see them: statuses, headers, what is given back, and the line in the ledger."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import EngineError, RequestError
from tokenmill.server.app import create_app
from tokenmill.server.config import ServerConfig, StoreConfig
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.principal import Limits
from tokenmill.server.tenancy.costs import Prices
from tokenmill.server.tenancy.keys import Keyring, Keys, KeySpec
from tokenmill.server.tenancy.ledger import Entry, NoLedger
from tokenmill.server.tenancy.limits import duration
from tokenmill.server.tenancy.limits_memory import MemoryQuotas
from tokenmill.server.tenancy.limits_redis import RedisQuotas
from tokenmill.server.tenancy.store import Store
from tokenmill.server.tenancy.tenants import Tenants
from tokenmill.types import FinishReason


class ListLedger(NoLedger):
    """Keeps lines in a list."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def record(self, entry: Entry) -> None:
        self.entries.append(entry)


@pytest.fixture
def ledger() -> ListLedger:
    return ListLedger()


@pytest.fixture
def keyring(tmp_path: Any) -> Keyring:
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    return Keyring(Keys(store))


@pytest.fixture(params=["memory", "redis"])
async def quotas(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    made: Any = MemoryQuotas()
    if request.param == "redis":
        made = RedisQuotas(request.getfixturevalue("redis_server").url, made)
    yield made
    await made.close()


@pytest.fixture
def app(llm: Any, keyring: Keyring, ledger: ListLedger, quotas: Any) -> FastAPI:
    prices = Prices(per_million_input=1e6, per_million_output=1e6)  # a dollar per token
    tenants = Tenants(keyring=keyring, ledger=ledger, quotas=quotas, prices=prices)
    return create_app(llm, ServerConfig(), Metrics("scripted"), tenants)


@pytest.fixture
async def client(app: FastAPI, keyring: Keyring) -> AsyncIterator[Callable[..., httpx2.AsyncClient]]:
    """Makes clients whose keys have the given limits."""
    async with contextlib.AsyncExitStack() as stack:
        opened = []

        def make(**limits: Any) -> httpx2.AsyncClient:
            _, secret = keyring.keys.create(KeySpec(name="x", limits=Limits(**limits)))
            keyring.refresh()
            opened.append(
                httpx2.AsyncClient(
                    transport=httpx2.ASGITransport(app=app),
                    base_url="http://server",
                    headers={"authorization": f"Bearer {secret}"},
                )
            )
            stack.push_async_callback(opened[-1].aclose)
            return opened[-1]

        yield make


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": [1, 2, 3], "max_tokens": 10, **fields}


def tokens_of(answer: Any) -> int:
    used: int = answer.json()["usage"]["total_tokens"]
    return used


async def test_requests_a_minute_and_the_headers_of_openai(client: Any, llm: Any) -> None:
    http = client(requests_per_minute=3)
    answers = [await http.post("/v1/completions", json=completion()) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"3"}
    assert answers[0].headers["x-ratelimit-reset-requests"][-1] == "s"
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    error = answers[3].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert len(llm.calls) == 3


async def test_tokens_a_minute_are_taken_before_and_given_back_after(client: Any) -> None:
    http = client(tokens_per_minute=1000)
    first = await http.post("/v1/completions", json=completion(max_tokens=900))
    used = tokens_of(first)
    assert used < 20
    assert first.headers["x-ratelimit-remaining-tokens"] == "97"  # of 1000, when it began
    second = await http.post("/v1/completions", json=completion(max_tokens=900))
    assert second.status_code == 200
    assert int(second.headers["x-ratelimit-remaining-tokens"]) in range(97 - used, 98)
    assert second.headers["x-ratelimit-limit-tokens"] == "1000"


async def test_a_request_that_may_take_more_than_a_minute_s_worth_waits_for_a_full_bucket(client: Any) -> None:
    http = client(tokens_per_minute=100)
    assert (await http.post("/v1/completions", json=completion(max_tokens=2000))).status_code == 200
    refused = await http.post("/v1/completions", json=completion(max_tokens=2000))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    too_long = await http.post("/v1/completions", json=completion(prompt=[1] * 101))
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "prompt_exceeds_limit")


async def test_without_max_tokens_the_whole_context_may_be_needed(client: Any, chat_body: Any) -> None:
    http = client(tokens_per_day=2047)
    refused = await http.post("/v1/chat/completions", json=chat_body())
    assert refused.json()["error"]["code"] == "tokens_per_day_exceeded"
    assert "max_tokens" in refused.json()["error"]["message"]
    assert (await http.post("/v1/chat/completions", json=chat_body(max_tokens=5))).status_code == 200


async def test_every_completion_of_a_request_counts(client: Any) -> None:
    http = client(tokens_per_day=43)
    assert (await http.post("/v1/completions", json=completion(n=5))).status_code == 429
    assert (await http.post("/v1/completions", json=completion(n=4))).status_code == 200


async def test_an_embedding_takes_its_input_and_nothing_more(client: Any, ledger: ListLedger) -> None:
    http = client(tokens_per_day=6)
    for status in (200, 200, 429):
        assert (await http.post("/v1/embeddings", json={"input": [1, 2, 3]})).status_code == status
    assert [(line.endpoint, line.prompt_tokens, line.completion_tokens) for line in ledger.entries] == [
        ("/v1/embeddings", 3, 0)
    ] * 2
    assert {line.finish for line in ledger.entries} == {"stop"}


async def test_tokens_a_day(client: Any) -> None:
    http = client(tokens_per_day=30)
    used = 0
    while (answer := await http.post("/v1/completions", json=completion())).status_code == 200:
        used += tokens_of(answer)
    assert answer.json()["error"]["code"] == "tokens_per_day_exceeded"
    assert 30 - 13 < used <= 30
    assert int(answer.headers["retry-after"]) <= 86_400


async def test_dollars_a_day(client: Any, ledger: ListLedger) -> None:
    http = client(dollars_per_day=30.5)
    while (answer := await http.post("/v1/completions", json=completion())).status_code == 200:
        pass
    assert answer.json()["error"]["code"] == "dollars_per_day_exceeded"
    assert 30.5 - 13 < sum(entry.dollars for entry in ledger.entries) <= 30.5


async def test_of_200_requests_at_once_as_many_run_as_may(client: Any, llm: Any) -> None:
    llm.endless = True
    http = client(concurrency=7)
    asking = [asyncio.create_task(http.post("/v1/completions", json=completion())) for _ in range(200)]
    answers = []
    for done in asyncio.as_completed(asking):
        answers.append(await done)
        if len(answers) == 193:
            break
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.json()["error"]["code"] for answer in answers} == {"concurrency_exceeded"}
    assert len(llm.calls) == 7
    running = [task for task in asking if not task.done()]
    assert len(running) == 7
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    llm.endless = False
    for _ in range(7):  # their seats are free again
        assert (await http.post("/v1/completions", json=completion())).status_code == 200


async def test_a_burst_of_200_over_http_passes_what_the_limits_say(client: Any) -> None:
    http = client(requests_per_minute=5, tokens_per_day=10_000)
    answers = await asyncio.gather(*(http.post("/v1/completions", json=completion()) for _ in range(200)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 195


@pytest.mark.parametrize("error", [RequestError("prompt_too_long", "No."), EngineError("engine_dead", "No.")])
async def test_what_the_engine_refuses_costs_no_tokens_and_no_seat(
    client: Any, llm: Any, ledger: ListLedger, error: Exception
) -> None:
    http = client(tokens_per_day=14, concurrency=1)
    llm.refusal = error
    for _ in range(3):
        assert (await http.post("/v1/completions", json=completion())).status_code in (400, 500)
    llm.refusal = None
    assert (await http.post("/v1/completions", json=completion())).status_code == 200
    assert len(ledger.entries) == 1


async def test_a_client_that_goes_away_pays_for_what_it_got(client: Any, llm: Any, ledger: ListLedger) -> None:
    llm.endless = True
    http = client(tokens_per_day=1000, concurrency=1)
    asking = asyncio.create_task(http.post("/v1/completions", json=completion(stream=True)))
    while not llm.calls:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await llm.ended.get()
    [line] = ledger.entries
    assert (line.finish, line.prompt_tokens, line.error_code) == ("abort", 3, "")
    llm.endless = False
    assert (await http.post("/v1/completions", json=completion())).status_code == 200


async def test_a_request_becomes_a_line_in_the_ledger(client: Any, llm: Any, ledger: ListLedger) -> None:
    http = client(requests_per_minute=100)
    answer = await http.post("/v1/completions", json=completion())
    llm.failure, llm.finish = None, FinishReason.LENGTH
    await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "n": 2})
    first, second = ledger.entries
    assert first.request_id.startswith(answer.json()["id"])
    assert (first.endpoint, first.model, first.finish) == ("/v1/completions", "scripted", "stop")
    usage = answer.json()["usage"]
    assert first.prompt_tokens == usage["prompt_tokens"] == 3
    assert first.cached_tokens == usage["prompt_tokens_details"]["cached_tokens"]
    assert first.completion_tokens == usage["completion_tokens"] > 0
    assert first.dollars == pytest.approx(usage["total_tokens"])
    assert len(first.key_id) == 12
    assert first.total_s >= 0
    assert (second.endpoint, second.finish) == ("/v1/chat/completions", "length")
    assert second.completion_tokens == 2 * first.completion_tokens


async def test_the_official_client_waits_and_asks_again(keyring: Keyring, url: str) -> None:
    _, secret = keyring.keys.create(KeySpec(name="x", limits=Limits(requests_per_minute=60)))
    keyring.refresh()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:
        raw = await client.completions.with_raw_response.create(model="scripted", prompt="a", max_tokens=1)
        assert raw.headers["x-ratelimit-limit-requests"] == "60"
        asking = [client.completions.create(model="scripted", prompt="a", max_tokens=1) for _ in range(200)]
        with pytest.raises(openai.RateLimitError) as caught:
            await asyncio.gather(*asking)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"


async def test_the_metrics_of_limits_and_cost(client: Any, keyring: Keyring) -> None:
    http = client(requests_per_minute=1)
    total = tokens_of(await http.post("/v1/completions", json=completion()))
    await http.post("/v1/completions", json=completion())
    _, secret = keyring.keys.create(KeySpec(name="prometheus", scopes=frozenset({"metrics"})))
    keyring.refresh()
    text = (await http.get("/metrics", headers={"authorization": f"Bearer {secret}"})).text
    assert f"tokenmill:cost_dollars_total {float(total)}" in text
    assert 'tokenmill:rate_limited_requests_total{limit="requests"} 1.0' in text
    assert "tokenmill:ledger_lost_records_total 0.0" in text
    assert "tokenmill:ledger_pending_records 0.0" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.02, "20ms"), (0.9999, "1000ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"),
     (360, "6m0s"), (61.25, "1m1.25s"), (86_399, "23h59m59s")],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e6))
def test_a_duration_is_never_shorter_than_it_is(seconds: float) -> None:
    text = duration(seconds)
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    total, number = 0.0, ""
    for letter in text.replace("ms", "@"):
        if letter == "@":
            total += float(number) / 1000
        elif letter in units:
            total, number = total + float(number) * units[letter], ""
        else:
            number += letter
    assert seconds - 1e-6 <= total <= seconds + 0.0011
