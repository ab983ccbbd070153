"""Whatever is sent, the answer is one that the document promises, and the server serves on.

`--cases N` sends N bodies and at least N / 5 documented requests; `make fuzz` sends 10,000 and 2,000.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance
from tests.e2e.conftest import running_server

from tokenmill.testing import random_model

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"stop": ["x"], "logit_bias": {"5": 1}, "tools": [], "n": 2, "seed": 1},
    "/v1/completions": COMPLETION | {"logprobs": 1, "echo": True, "top_p": 0.5},
    "/v1/messages": CHAT | {"system": "Be brief."},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": CHAT["messages"]},
    "/v1/responses": {"model": "tiny", "input": CHAT["messages"], "max_output_tokens": 2, "store": False},
    "/v1/responses/compact": {"model": "tiny", "input": CHAT["messages"], "token_budget": 20},
    "/v1/batches": {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/v1/embeddings": {"model": "tiny", "input": ["Hi", "ho"], "dimensions": 4, "encoding_format": "base64"},
    "/v1/rerank": {"model": "tiny", "query": "Hi", "documents": ["a", {"text": "b"}], "top_n": 1},
    "/v1/score": {"model": "tiny", "text_1": "Hi", "text_2": ["a", "b"]},
    "/tokenize": {"model": "tiny", "prompt": "Hi", "return_token_strs": True, "add_special_tokens": True},
    "/detokenize": {"model": "tiny", "tokens": [72, 105]},
    "/v1/chat/render": CHAT | {"tools": [], "chat_template_kwargs": {}},
}
ODD: list[Any] = [
    None, True, 0, -1, 2**63, -(2**64), 10**40, 1.5, 1e308, "", "x", "\0", "\ud800", "😀", "x" * 5000, [], [[]], {},
    {"a": None}, ["\udfff"], {"\ud800": "\ud800"}, [0] * 500,
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server whose model is as fast as a model can be."""
    folder = random_model(Path(tmp_path_factory.mktemp("tiny")))
    with running_server(
        str(folder),
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "64",
        "--max-body-mib",
        "2",
        "--threads",
        "1",
        "--log-level",
        "error",
    ) as server:
        yield server.url


def test_documented_requests_get_documented_answers(tiny: str, pytestconfig: pytest.Config) -> None:
    document = schemathesis.openapi.from_url(f"{tiny}/openapi.json")
    found = [operation.ok() for operation in document.get_all_operations()]
    operations = [operation for operation in found if operation.path != "/admin/drain"]  # which does as it says
    assert "/v1/chat/completions" in {operation.path for operation in operations}
    total = 0
    for operation in operations:
        sent = 0

        @settings(
            max_examples=max(1, pytestconfig.getoption("cases") // len(operations) // 2),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def send(case: Any) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=[not_a_server_error, status_code_conformance], timeout=60)

        send()
        assert sent > 0, operation.label
        total += sent
    assert total >= pytestconfig.getoption("cases") / 5


def bodies(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Endless requests that are wrong, or nearly so."""
    kinds = (_broken, _mistyped, _extended, _numbers, _nested, _not_text, _surrogates, _random)
    while True:
        path = rng.choice(list(VALID))
        yield path, rng.choice(kinds)(rng, VALID[path])


def _broken(rng: random.Random, valid: dict[str, Any]) -> bytes:
    data = bytearray(json.dumps(valid).encode())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        data[place : place + rng.randint(0, 3)] = rng.choice(
            [b"", b"{", b"]", b'"', b",", b"\\", b"\\u12", b"//", b"'"]
        )
    return bytes(data[: rng.randint(1, len(data) * 2)] if data else b"")


def _mistyped(rng: random.Random, valid: dict[str, Any]) -> bytes:
    changed = dict(valid)
    for field in rng.sample(list(changed), rng.randint(1, 2)):
        changed[field] = rng.choice(ODD)
    return json.dumps(changed).encode()


def _extended(rng: random.Random, valid: dict[str, Any]) -> bytes:
    fields = (
        "stop", "temperature", "top_p", "top_k", "logprobs", "response_format", "tools", "tool_choice", "stream",
        "seed", "stream_options", "guided_json", "guided_regex", "structured_outputs", "logit_bias",
        "cache_salt", "priority",
        "user", "metadata", "chat_template_kwargs", "bad_words", "allowed_token_ids", "timeout_s",
        "prompt_logprobs", "min_tokens",
    )  # fmt: skip
    return json.dumps(valid | {field: rng.choice(ODD) for field in rng.sample(fields, rng.randint(1, 3))}).encode()


def _numbers(rng: random.Random, valid: dict[str, Any]) -> bytes:
    number = rng.choice(
        ["1e400", "-1e400", "1" * 400, "NaN", "Infinity", "-0", "0.0000001", "1E+2", "01", "1.", "9" * 19]
    )
    field = rng.choice(["max_tokens", "temperature", "seed", "top_k", "n", "min_p"])
    return json.dumps(valid | {field: 0}).replace(f'"{field}": 0', f'"{field}": {number}').encode()


def _nested(rng: random.Random, valid: dict[str, Any]) -> bytes:
    depth = rng.choice([50, 2_000, 100_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    deep = opened * depth + "1" + closed * rng.choice([depth, depth - 1])
    field = rng.choice([*valid, "metadata", "guided_json", "response_format"])
    return json.dumps(valid | {field: "HERE"}).replace('"HERE"', deep).encode()


def _not_text(rng: random.Random, valid: dict[str, Any]) -> bytes:
    junk = rng.choice([b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\x80", b"\xf8\x88\x80\x80\x80", b"\0"])
    return rng.choice([junk + json.dumps(valid).encode(), json.dumps(valid).encode().replace(b"Hi", b"H" + junk)])


def _surrogates(rng: random.Random, valid: dict[str, Any]) -> bytes:
    half = rng.choice(["\\ud800", "\\udfff", "\\ud800x", "\\udc00\\ud800", "\\ud83d\\ude00"])
    return json.dumps(valid).replace("Hi", half).replace("tiny", rng.choice(["tiny", half])).encode()


def _random(rng: random.Random, _: dict[str, Any]) -> bytes:
    return rng.randbytes(rng.randint(0, 200))


async def test_raw_bodies_of_every_kind_leave_the_server_well(tiny: str, pytestconfig: pytest.Config) -> None:
    statuses: Counter[int] = Counter()
    pending = bodies(random.Random(0))
    count = pytestconfig.getoption("cases")

    async with httpx2.AsyncClient(base_url=tiny, timeout=120) as http:

        async def sender() -> None:
            nonlocal count
            while count > 0:
                count -= 1
                path, body = next(pending)
                answer = await http.post(path, content=body)
                statuses[answer.status_code] += 1
                assert answer.status_code in (200, 400, 404, 408, 413), (path, body[:500], answer.text[:500])
                if answer.status_code != 200:
                    error = answer.json()["error"]
                    assert error["message"], (path, body[:500])
                    assert error["code"], (path, body[:500])

        await asyncio.gather(*[sender() for _ in range(16)])
        answer = await http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 2
        health = (await http.get("/health")).json()
        assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)
        metrics = (await http.get("/metrics")).text
    assert {"vllm:kv_cache_usage_perc 0.0"} <= {_bare(line) for line in metrics.splitlines()}
    assert statuses[400] > statuses.total() / 3


def _bare(line: str) -> str:
    name, _, value = line.partition("{")
    return f"{name} {value.rpartition('}')[2].strip()}" if value else line
