"""1,000 streams at concurrency 128 against the built-in model; some are invalid, some given up at a random moment."""

import asyncio
import random

import httpx2
import openai
import psutil
from tests.e2e.conftest import running_server

REQUESTS = 1000
WARM = 400
CONCURRENCY = 128


def resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and its children: HTTP and engine."""
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])


async def wave(client: openai.AsyncOpenAI, seed: int, count: int) -> dict[str, int]:
    """Sends requests of random lengths: 5 % are invalid, 10 % disconnect in mid-stream, 3 % before their answer."""
    rng = random.Random(seed)
    limit = asyncio.Semaphore(CONCURRENCY)
    ends = {"stop": 0, "length": 0, "disconnected": 0, "cancelled": 0, "refused": 0}

    async def one(words: int, tokens: int, fate: float, after: int) -> None:
        prompt = " ".join(f"word{rng.randrange(50)}" for _ in range(words))
        async with limit:
            if fate < 0.05:
                try:
                    await client.completions.create(model="demo", prompt=prompt, max_tokens=0, stream=True)
                except openai.BadRequestError as error:
                    assert error.param == "max_tokens"  # noqa: PT017
                    ends["refused"] += 1
                return
            if fate < 0.08:
                # Not streamed, and given up by the client's own time limit.
                try:
                    await client.with_options(timeout=0.05, max_retries=0).completions.create(
                        model="demo", prompt=prompt, max_tokens=400, extra_body={"ignore_eos": True}
                    )
                except openai.APITimeoutError:
                    ends["cancelled"] += 1
                else:
                    ends["length"] += 1
                return
            stream = await client.completions.create(model="demo", prompt=prompt, max_tokens=tokens, stream=True)
            seen = 0
            async for chunk in stream:
                seen += 1
                if fate < 0.18 and seen > after:
                    await stream.close()
                    ends["disconnected"] += 1
                    return
                if chunk.choices and chunk.choices[0].finish_reason:
                    ends[chunk.choices[0].finish_reason] += 1

    await asyncio.gather(
        *(one(rng.randint(1, 150), rng.randint(1, 120), rng.random(), rng.randint(0, 40)) for _ in range(count))
    )
    return ends


async def idle(http: httpx2.AsyncClient) -> dict[str, float]:
    """The metrics once nothing waits or runs; a disconnect is noticed within moments."""
    async with asyncio.timeout(60):
        while True:
            text = (await http.get("/metrics")).text
            values = {}
            for line in text.splitlines():
                if line and not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    values[name.partition("{")[0] + _label(name)] = float(value)
            if values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == 0:
                return values
            await http.get("/health")


def _label(name: str) -> str:
    for label in ("finished_reason",):
        if f'{label}="' in name:
            return "/" + name.split(f'{label}="')[1].split('"')[0]
    return ""


async def test_nothing_is_lost_leaked_or_left_behind():
    with running_server("demo", "--memory-gib", "0.05") as server:
        process = psutil.Process(server.process.pid)
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
            httpx2.AsyncClient(base_url=server.url) as http,
        ):
            warm = await wave(client, 0, WARM)
            before = await idle(http)
            memory = resident(process)

            ends = await wave(client, 0, REQUESTS)
            assert (sum(warm.values()), sum(ends.values())) == (WARM, REQUESTS)
            assert ends["disconnected"] > REQUESTS / 20
            assert ends["refused"] > REQUESTS / 40

            after = await idle(http)
            assert after["vllm:kv_cache_usage_perc"] == 0
            finished = [name for name in after if name.startswith("vllm:request_success_total/")]
            ended = sum(after[name] - before.get(name, 0) for name in finished)
            # A client may give up before its request has reached the engine.
            assert REQUESTS - ends["refused"] - ends["cancelled"] <= ended <= REQUESTS - ends["refused"]
            assert after.get("vllm:request_success_total/error", 0) == 0
            # The same work again must fit into what the first round left.
            assert resident(process) < memory * 1.05 + 8 * 2**20
        assert server.stop() == 0
