"""GET /v1/models: which model is served."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from tokenmill.server.service import Service, service_of
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.get("/v1/models")
async def models(request: Request) -> JSON:
    """All models: one."""
    return {"object": "list", "data": [_card(service_of(request))]}


@ROUTER.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> JSON:
    """One model; 404 ``model_not_found`` for another name."""
    service = service_of(request)
    service.check_model(name)
    return _card(service)


def _card(service: Service) -> JSON:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "tokenmill",
        "max_model_len": service.llm.max_model_len,
    }
