"""GET /v1/models: which model is served."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from tokenmill.server.openapi import documented
from tokenmill.server.principal import principal_of
from tokenmill.server.service import Service, service_of
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.get("/v1/models", **documented())
async def models(request: Request) -> JSON:
    """The model under each of its names that the key may use."""
    service, principal = service_of(request), principal_of(request)
    return {"object": "list", "data": [_card(service, name) for name in service.names if principal.may_use(name)]}


@ROUTER.get("/v1/models/{name:path}", **documented(None, 404))
async def model(request: Request, name: str) -> JSON:
    """One model; 404 ``model_not_found`` for another name."""
    service = service_of(request)
    return _card(service, service.check_model(name))


def _card(service: Service, name: str) -> JSON:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "tokenmill",
        "root": service.llm.model_name,
        "max_model_len": service.llm.max_model_len,
    }
