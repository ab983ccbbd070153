"""GET /metrics: for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.server.lifecycle import lifecycle_of
from tokenmill.server.openapi import documented
from tokenmill.server.service import service_of

ROUTER = APIRouter()


@ROUTER.get("/metrics", **documented())
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = service_of(request)
    health, draining = service.llm.health(), lifecycle_of(request).draining
    rendered = service.metrics.render(service.llm.stats, health.ok, draining, health.restarts)
    return Response(rendered, media_type=CONTENT_TYPE_LATEST)
