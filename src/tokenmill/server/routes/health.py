"""GET /health: whether steps advance, not merely whether the process lives."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from tokenmill.server.openapi import documented
from tokenmill.server.service import service_of

ROUTER = APIRouter()


@ROUTER.get("/health", **documented(None, 503))
async def health(request: Request) -> JSONResponse:
    """200 while the engine makes progress or has nothing to do; 503 when it is dead, stuck, or shutting down."""
    state = service_of(request).llm.health()
    if request.app.state.stopping:
        status, reason = "shutting_down", "The server is shutting down."
    else:
        status, reason = ("ok" if state.ok else "unhealthy"), state.reason
    content = {
        "status": status,
        "reason": reason,
        "last_progress_age_s": round(state.last_progress_age_s, 3),
        "running": state.running,
        "waiting": state.waiting,
    }
    return JSONResponse(content, 200 if status == "ok" else 503)
