"""GET /metrics: for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.openapi import documented
from tokenmill.server.service import service_of

ROUTER = APIRouter()


@ROUTER.get("/metrics", **documented())
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = service_of(request)
    up, draining = service.llm.health().ok, request.app.state.stopping
    return Response(service.metrics.render(service.llm.stats, up, draining), media_type=CONTENT_TYPE_LATEST)
