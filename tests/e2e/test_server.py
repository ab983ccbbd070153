"""The built-in model behind a real server, through the official client."""

import json

import httpx2
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture
def client(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(demo_server):
    with httpx2.Client(base_url=demo_server.url, timeout=60) as http:
        yield http


def ask(client, **fields):
    return client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=24, **fields)


def test_the_model_is_listed(client):
    [model] = client.models.list()
    assert model.id == "demo"
    assert client.models.retrieve("demo").max_model_len > 100


def test_a_stream_adds_up_to_the_whole_answer(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content != ""
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens > 0


def test_a_prompt_that_was_seen_is_cached(client):
    prompt = "Numbers: " + " ".join(map(str, range(60)))
    first, second = [client.completions.create(model="demo", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_length_and_stop_strings(client):
    whole = client.completions.create(
        model="demo", prompt="The", temperature=0, max_tokens=16, extra_body={"ignore_eos": True}
    )
    text = whole.choices[0].text
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 16)
    stop = text[5:8]
    for stream in (False, True):
        answer = client.completions.create(
            model="demo", prompt="The", temperature=0, max_tokens=16, stop=stop, stream=stream,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


def test_a_seed_repeats_several_choices(client):
    def texts():
        answer = client.completions.create(model="demo", prompt="Once", n=3, seed=11, max_tokens=8, temperature=1)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    assert texts() == texts()


def test_logprobs_are_consistent(client):
    answer = ask(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy takes the most likely one

    scored = client.completions.create(model="demo", prompt="a b c", echo=True, logprobs=1, max_tokens=0)
    logprobs = scored.choices[0].logprobs
    assert "".join(logprobs.tokens) == scored.choices[0].text == "a b c"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_a_prompt_that_is_too_long_is_refused(client):
    longest = client.models.retrieve("demo").max_model_len
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="demo", prompt=[5] * (longest + 1), stream=stream)
        assert (refused.value.code, refused.value.param) == ("prompt_too_long", "prompt")


def test_token_ids_that_do_not_exist_are_refused(client):
    for prompt in ([2**62], [-1]):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="demo", prompt=prompt)
        assert refused.value.code == "invalid_token"


def test_leaving_a_stream_frees_the_engine(http):
    body = {"prompt": "The", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    health = http.get("/health").json()
    while health["running"] or health["waiting"]:
        health = http.get("/health").json()
    assert health["status"] == "ok"
    assert 'finished_reason="abort"' in http.get("/metrics").text


def test_what_a_stream_looks_like_on_the_wire(http):
    answer = http.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 4, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [line for line in answer.text.splitlines() if line]
    assert done == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
