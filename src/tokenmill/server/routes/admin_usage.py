"""GET /admin/usage: what the usage ledger tells; `tokenmill usage` is the same for people."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenmill.errors import RequestError
from tokenmill.server.openapi import documented
from tokenmill.server.tenancy.store import Store
from tokenmill.server.tenancy.usage import rows

ROUTER = APIRouter()


@ROUTER.get("/admin/usage", **documented(None, 400, 503))
async def usage(request: Request, by: str = "key", since: str | None = None, until: str | None = None) -> Response:
    """Tokens, times and cost by ``key``, ``model`` or ``day``, from one UTC day to another."""
    store = request.app.state.tenants.store
    if store is None:
        raise RequestError("ledger_off", "This server writes no usage down.")
    if by == "request":
        raise RequestError("invalid_parameter", "Single requests are told by `tokenmill usage` only.", "by")
    found = await asyncio.to_thread(_read, store, by, since, until)
    return Response(msgspec.json.encode({"object": "list", "data": found}), media_type="application/json")


def _read(store: Store, by: str, since: str | None, until: str | None) -> list[dict[str, object]]:
    store.migrate()
    return list(rows(store, by, since, until))
