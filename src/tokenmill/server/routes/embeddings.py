"""POST /v1/embeddings.

Source: https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import base64
import sys
import uuid
from array import array

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.generation import until_disconnect
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.embeddings import EmbeddingRequest
from tokenmill.server.schemas.request import parse
from tokenmill.server.scoring import Asker, Question
from tokenmill.server.service import service_of
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.post("/v1/embeddings", **documented(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    """Embeds one or several texts."""
    service = service_of(request)
    body = parse(EmbeddingRequest, await request.body())
    model = service.check_model(body.model)
    pooling = msgspec.structs.replace(service.llm.pooling, dimensions=body.dimensions)
    if body.normalize is not None:
        pooling = msgspec.structs.replace(pooling, normalize=body.normalize)
    ask = Asker(request, body, model, f"embd-{uuid.uuid4().hex}", "input")
    outputs = await until_disconnect(request.receive, ask([Question(each, pooling) for each in body.inputs()]))
    encode = _base64 if body.encoding_format == "base64" else _numbers
    data = [
        {"object": "embedding", "index": index, "embedding": encode(output.embedding or array("f"))}
        for index, output in enumerate(outputs)
    ]
    answer: JSON = {"object": "list", "data": data, "model": model, "usage": ask.usage.to_json()}
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _numbers(embedding: array[float]) -> list[float]:
    return embedding.tolist()


def _base64(embedding: array[float]) -> str:
    if sys.byteorder == "big":
        embedding = embedding[:]
        embedding.byteswap()
    return base64.b64encode(embedding.tobytes()).decode()
