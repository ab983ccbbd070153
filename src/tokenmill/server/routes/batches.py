"""/v1/batches: many requests from a file, answered in the gaps of live traffic.

Source: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request

from tokenmill.server.batch.backlog import backlog_of
from tokenmill.server.lists import listed
from tokenmill.server.openapi import documented
from tokenmill.server.principal import principal_of
from tokenmill.server.schemas.batches import BatchRequest
from tokenmill.server.schemas.request import parse
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.post("/v1/batches", **documented(BatchRequest))
async def create_batch(request: Request) -> JSON:
    """Begins a batch."""
    body = parse(BatchRequest, await request.body())
    return await backlog_of(request).batches.create(body, principal_of(request))


@ROUTER.get("/v1/batches", **documented(None, 400, 404, 503))
async def list_batches(
    request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> JSON:
    """The batches of whoever asks, the newest first."""
    return listed(*await backlog_of(request).batches.page(principal_of(request).key_id, after, limit))


@ROUTER.get("/v1/batches/{batch_id}", **documented(None, 404, 503))
async def retrieve_batch(request: Request, batch_id: str) -> JSON:
    """A batch as it is now."""
    return await backlog_of(request).batches.get(batch_id, principal_of(request).key_id)


@ROUTER.post("/v1/batches/{batch_id}/cancel", **documented(None, 400, 404, 503))
async def cancel_batch(request: Request, batch_id: str) -> JSON:
    """Ends a batch early."""
    return await backlog_of(request).batches.cancel(batch_id, principal_of(request).key_id)
