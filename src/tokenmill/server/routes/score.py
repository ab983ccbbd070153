"""POST /score and /v1/score: how well texts match, in the order in which they came.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#score-api
"""

from __future__ import annotations

import time
import uuid

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.generation import until_disconnect
from tokenmill.server.openapi import documented
from tokenmill.server.schemas.request import parse
from tokenmill.server.schemas.scoring import ScoreRequest
from tokenmill.server.scoring import Asker, scorer_of
from tokenmill.server.service import service_of
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.post("/score", **documented(ScoreRequest))
@ROUTER.post("/v1/score", **documented(ScoreRequest))
async def score(request: Request) -> Response:
    """Scores pairs of texts."""
    service = service_of(request)
    body = parse(ScoreRequest, await request.body())
    model = service.check_model(body.model)
    answer_id = f"score-{uuid.uuid4().hex}"
    ask = Asker(request, body, model, answer_id, "documents" if body.text_2 is None else "text_2")
    scores = await until_disconnect(request.receive, scorer_of(request).score(service.llm, body.pairs(), ask))
    answer: JSON = {
        "id": answer_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
        "usage": ask.usage.to_json(),
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")
