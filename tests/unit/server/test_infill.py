"""``suffix`` of POST /v1/completions."""

import copy
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from tokenmill.server.app import create_app
from tokenmill.server.config import ServerConfig
from tokenmill.server.observability.metrics import Metrics
from tokenmill.text.tokenizer import Tokenizer

MARKS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"]


@pytest.fixture
def coder(llm: Any) -> Any:
    """A model whose vocabulary has the marks of StarCoder."""
    backend = copy.deepcopy(llm.tokenizer._backend)
    backend.add_special_tokens(MARKS)
    llm.tokenizer = Tokenizer(backend)
    return llm


@pytest.fixture
async def fim(coder: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(coder, ServerConfig(), Metrics("scripted"))
    transport: Any = httpx2.ASGITransport(app=app)
    async with openai.AsyncOpenAI(
        base_url="http://server/v1", api_key="none", max_retries=0, http_client=httpx2.AsyncClient(transport=transport)
    ) as client:
        yield client


def prompt_of(coder: Any, call: Any) -> str:
    return coder.tokenizer.decode(call.prompt, skip_special_tokens=False)


async def test_the_model_gets_both_sides_of_the_gap(fim: openai.AsyncOpenAI, coder: Any) -> None:
    answer = await fim.completions.create(model="scripted", prompt="def f():", suffix=" return y", n=2)
    assert prompt_of(coder, coder.calls[0]) == "<fim_prefix>def f():<fim_suffix> return y<fim_middle>"
    assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
    assert coder.calls[0].params.stop_token_ids == [coder.tokenizer.token_id("<|endoftext|>")]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_gives_the_prompt_back_as_it_was_sent(fim: openai.AsyncOpenAI, coder: Any, stream: bool) -> None:
    answer: Any = await fim.completions.create(
        model="scripted", prompt=["a", "b"], suffix="z", echo=True, stream=stream
    )
    texts = ["", ""]
    if stream:
        async for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = [choice.text for choice in answer.choices]
    assert texts == ["aHello world", "bHello world"]
    assert [prompt_of(coder, call) for call in coder.calls] == [
        f"<fim_prefix>{text}<fim_suffix>z<fim_middle>" for text in "ab"
    ]


async def test_a_prompt_of_tokens_can_have_a_suffix(fim: openai.AsyncOpenAI, coder: Any) -> None:
    ids = coder.tokenizer.encode("def f():")
    answer = await fim.completions.create(model="scripted", prompt=ids, suffix="z", echo=True)
    assert answer.choices[0].text == "def f():Hello world"


async def test_who_ignores_the_end_of_the_text_ignores_that_of_the_middle(fim: openai.AsyncOpenAI, coder: Any) -> None:
    await fim.completions.create(model="scripted", prompt="a", suffix="z", extra_body={"ignore_eos": True})
    assert coder.calls[0].params.stop_token_ids == []


async def test_log_probabilities_of_an_echo_are_refused(fim: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await fim.completions.create(model="scripted", prompt="a", suffix="z", echo=True, logprobs=1)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "logprobs")


async def test_a_model_without_the_tokens_says_so(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "suffix")
    assert "fill in the middle" in error["message"]
