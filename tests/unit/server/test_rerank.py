"""POST /rerank and /score, by embeddings."""

import math
from typing import Any

import httpx2
import pytest

DOCUMENTS = ["ccc", "a", "ab"]


async def test_the_best_document_comes_first(http: httpx2.AsyncClient, llm: Any) -> None:
    answer = (await http.post("/v1/rerank", json={"model": "scripted", "query": "aa", "documents": DOCUMENTS})).json()
    assert [result["index"] for result in answer["results"]] == [1, 2, 0]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == pytest.approx([3 / math.sqrt(10), 3 / math.sqrt(15), 1 / math.sqrt(50)], rel=1e-6)
    assert [result["document"] for result in answer["results"]] == [{"text": DOCUMENTS[i]} for i in (1, 2, 0)]
    assert len(llm.calls) == 4  # the query once
    tokens = sum(len(llm.tokenizer.encode(text)) for text in ["aa", *DOCUMENTS])
    assert answer["usage"]["total_tokens"] == tokens
    assert answer["id"].startswith("rerank-")


@pytest.mark.parametrize(("path", "texts"), [("/rerank", True), ("/v1/rerank", True), ("/v2/rerank", False)])
async def test_the_form_of_the_path(http: httpx2.AsyncClient, path: str, texts: bool) -> None:
    body: dict[str, Any] = {"query": "a", "documents": [{"text": "b"}, "a"], "top_n": 1}
    [result] = (await http.post(path, json=body)).json()["results"]
    assert result["index"] == 1
    assert ("document" in result) == texts
    [result] = (await http.post(path, json=body | {"return_documents": not texts})).json()["results"]
    assert ("document" in result) == (not texts)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text_1": "a", "text_2": "a"}, [1.0]),
        ({"text_1": "a", "text_2": ["a", "a"]}, [1.0, 1.0]),
        ({"text_1": ["a", "b"], "text_2": ["a", "b"]}, [1.0, 1.0]),
        ({"queries": "a", "documents": ["a", "b"]}, [1.0, 0.5]),
    ],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_scores_come_in_the_order_of_the_pairs(
    http: httpx2.AsyncClient, path: str, body: Any, expected: list[float]
) -> None:
    answer = (await http.post(path, json=body)).json()
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected, rel=1e-6)
    assert [item["index"] for item in answer["data"]] == list(range(len(expected)))
    assert (answer["object"], answer["data"][0]["object"], answer["model"]) == ("list", "score", "scripted")


@pytest.mark.parametrize(
    ("path", "body", "code", "field"),
    [
        ("/rerank", {"query": "a"}, "missing_parameter", "documents"),
        ("/rerank", {"query": "a", "documents": []}, "invalid_parameter", "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "invalid_parameter", "top_n"),
        ("/rerank", {"query": "", "documents": ["b"]}, "invalid_parameter", "query"),
        ("/rerank", {"query": "a", "documents": ["b", ""]}, "invalid_parameter", "documents[1]"),
        ("/score", {"text_1": "", "text_2": "b"}, "invalid_parameter", "text_1"),
        ("/rerank", {"query": 1, "documents": ["b"]}, "invalid_parameter", "query"),
        ("/rerank", {"query": "a", "documents": [{"text": "b", "id": 1}]}, "invalid_parameter", "documents[0]"),
        ("/score", {"text_1": "a"}, "missing_parameter", "text_2"),
        ("/score", {"text_1": "a", "text_2": []}, "invalid_parameter", "text_2"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "invalid_parameter", "text_2"),
        ("/score", {"queries": ["a", "b"], "documents": ["a"] * 3}, "invalid_parameter", "documents"),
        ("/score", {"text_1": "a", "queries": "a", "text_2": "a"}, "invalid_parameter", "queries"),
    ],
)
async def test_a_fault_is_named_by_its_field(
    http: httpx2.AsyncClient, path: str, body: Any, code: str, field: str
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["param"].startswith(field)
