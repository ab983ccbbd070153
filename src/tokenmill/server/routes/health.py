"""GET /livez, /readyz, /startupz for an orchestrator, and /health for whoever wants it all at once."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from tokenmill.observer import LOADING
from tokenmill.server.lifecycle import lifecycle_of
from tokenmill.server.openapi import documented
from tokenmill.server.service import service_of

ROUTER = APIRouter()


@ROUTER.get("/startupz", **documented(None, 503))
async def startupz(request: Request) -> JSONResponse:
    """200 once the model has been loaded for the first time; until then 503 with how far it is."""
    state = service_of(request).llm.health()
    starting = state.phase in LOADING
    content = {"status": "starting" if starting else "ok", "phase": state.phase, "percent": round(state.percent, 1)}
    return JSONResponse(content, 503 if starting else 200)


@ROUTER.get("/livez", **documented(None, 503))
async def livez(request: Request) -> JSONResponse:
    """200 while the event loop answers and the engine is not stuck.

    A crashed engine is no reason to end the process: it is being started again.
    """
    state = service_of(request).llm.health()
    return JSONResponse(
        {"status": "hung" if state.hung else "ok", "reason": state.reason if state.hung else ""},
        503 if state.hung else 200,
    )


@ROUTER.get("/readyz", **documented(None, 503))
async def readyz(request: Request) -> JSONResponse:
    """200 while requests are to be sent here; 503 with the reason otherwise.

    A server whose queue is full says so and stays ready: were all of them to leave the load balancer at once, clients
    would find nobody instead of a 429 that tells them when to come back.
    """
    state = service_of(request).llm.health()
    if lifecycle_of(request).draining:
        status, reason = "draining", "The server is shutting down."
    elif state.phase in LOADING:
        status, reason = "starting", f"The model is still loading ({state.phase}, {state.percent:.0f} %)."
    elif not state.ok:
        status, reason = ("hung" if state.hung else state.phase), state.reason
    elif state.full:
        status, reason = "saturated", f"{state.waiting} requests wait; more are refused."
    else:
        status, reason = "ok", ""
    return JSONResponse({"status": status, "reason": reason}, 200 if status in ("ok", "saturated") else 503)


@ROUTER.get("/health", **documented(None, 503))
async def health(request: Request) -> JSONResponse:
    """200 while the engine makes progress or has nothing to do; 503 when it is dead, stuck, or shutting down."""
    state = service_of(request).llm.health()
    if lifecycle_of(request).draining:
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
