"""POST /rerank, /v1/rerank and /v2/rerank: documents in the order in which they answer a query.

Source: https://jina.ai/reranker, https://docs.cohere.com/reference/rerank
"""

from __future__ import annotations

import uuid

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.generation import until_disconnect
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.request import parse
from tokenmill.server.schemas.scoring import RerankRequest
from tokenmill.server.scoring import Asker, scorer_of
from tokenmill.server.service import service_of
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.post("/v2/rerank", **documented(RerankRequest))
async def rerank_without_texts(request: Request) -> Response:
    """Scores documents against a query, best first. Results name documents by their index alone (Cohere)."""
    return await _rerank(request, with_texts=False)


@ROUTER.post("/rerank", **documented(RerankRequest))
@ROUTER.post("/v1/rerank", **documented(RerankRequest))
async def rerank(request: Request) -> Response:
    """Scores documents against a query, best first."""
    return await _rerank(request, with_texts=True)


async def _rerank(request: Request, with_texts: bool) -> Response:
    service = service_of(request)
    body = parse(RerankRequest, await request.body())
    model = service.check_model(body.model)
    answer_id = f"rerank-{uuid.uuid4().hex}"
    ask = Asker(request, body, model, answer_id, "documents")
    texts = body.texts()
    pairs = [(body.query, text) for text in texts]
    scores = await until_disconnect(request.receive, scorer_of(request).score(service.llm, pairs, ask))
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    if body.return_documents is not None:
        with_texts = body.return_documents
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": texts[index]}} if with_texts else {})
        for index in order
    ]
    answer: JSON = {"id": answer_id, "model": model, "results": results, "usage": ask.usage.to_json()}
    return Response(msgspec.json.encode(answer), media_type="application/json")
