"""POST /admin/drain: for a preStop hook or a notice that the machine will be taken away."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse

from tokenmill.server.lifecycle import lifecycle_of
from tokenmill.server.openapi import documented

ROUTER = APIRouter()


@ROUTER.post("/admin/drain", status_code=202, **documented(None, 400))
async def drain(request: Request, delay_s: Annotated[float, Query(ge=0, le=3600)] = 0.0) -> JSONResponse:
    """Makes the server not ready at once, refuses requests after `delay_s`, and ends it when it is idle.

    What still runs then has ``drain_timeout_s``, as after SIGTERM.
    """
    lifecycle_of(request).drain(delay_s)
    return JSONResponse({"status": "draining", "delay_s": delay_s}, 202)
