"""Embeddings and scores of the built-in model behind a real server, through the official client."""

import math

import httpx2
import openai
import pytest
from tests.e2e.conftest import running_server

from tokenmill import LLM

TEXTS = ["What is 17 + 25?", "What is 18 + 25?", "Name a color."]


@pytest.fixture
def client(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_embedding_is_that_of_the_engine_in_this_process(client):
    answer = client.embeddings.create(model="demo", input=TEXTS)
    ours = LLM("demo").embed(TEXTS)
    assert [item.embedding for item in answer.data] == [output.embedding.tolist() for output in ours]
    assert [math.fsum(x * x for x in item.embedding) for item in answer.data] == pytest.approx([1] * 3, rel=1e-5)
    assert answer.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in ours)
    short = client.embeddings.create(model="demo", input=TEXTS[0], dimensions=8)
    assert len(short.data[0].embedding) == 8


def test_documents_are_ranked_by_their_embeddings(client, demo_server):
    vectors = [item.embedding for item in client.embeddings.create(model="demo", input=TEXTS).data]
    body = {"model": "demo", "query": TEXTS[0], "documents": TEXTS[1:]}
    results = httpx2.post(f"{demo_server.url}/v1/rerank", json=body).json()["results"]
    cosines = {index: math.fsum(map(float.__mul__, vectors[0], vectors[1 + index])) for index in (0, 1)}
    assert [result["index"] for result in results] == sorted(cosines, key=lambda index: -cosines[index])
    assert [result["relevance_score"] for result in results] == pytest.approx(sorted(cosines.values())[::-1], rel=1e-5)


def test_a_server_can_score_by_yes_and_no():
    body = {"text_1": TEXTS[0], "text_2": TEXTS[1:]}
    with running_server(
        "demo", "--score-by", "yes-no", "--served-model-name", "one", "--served-model-name", "two"
    ) as server:
        first, again = (httpx2.post(f"{server.url}/score", json=body | {"model": name}) for name in ("one", "two"))
        scores = [item["score"] for item in first.json()["data"]]
        assert all(0 < score < 1 for score in scores)
        assert [item["score"] for item in again.json()["data"]] == scores
        assert (first.json()["model"], again.json()["model"]) == ("one", "two")
        assert server.stop() == 0


def test_too_many_dimensions_are_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="demo", input="a", dimensions=100_000)
    assert (refused.value.code, refused.value.param) == ("invalid_parameter", "dimensions")
