"""GET /version."""

from __future__ import annotations

from fastapi import APIRouter

import tokenmill
from tokenmill.server.openapi import documented
from tokenmill.types import JSON

ROUTER = APIRouter()


@ROUTER.get("/version", **documented())
async def version() -> JSON:
    """The version of the server."""
    return {"version": tokenmill.__version__}
