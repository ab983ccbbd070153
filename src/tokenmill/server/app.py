"""The HTTP server: the app built from its parts, and the process that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import psutil
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import State as AppState
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import tokenmill
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.crash import Reports
from tokenmill.errors import MissingDependencyError, RequestError, TokenmillError
from tokenmill.llm import AsyncLLM
from tokenmill.registry import Registry
from tokenmill.server.batch.backlog import Backlog
from tokenmill.server.batch.loopback import Loopback
from tokenmill.server.call import Interceptor
from tokenmill.server.config import SCORERS, ObserveConfig, ServerConfig
from tokenmill.server.connections.connection import Connection
from tokenmill.server.connections.listener import address_of, bind, load_tls, tls_options
from tokenmill.server.conversation.conversations import Conversations
from tokenmill.server.errors import response_of
from tokenmill.server.filter import FilterChain
from tokenmill.server.lifecycle import Lifecycle
from tokenmill.server.middleware.access import Access
from tokenmill.server.middleware.body_limit import BodyLimit
from tokenmill.server.middleware.request_id import RequestId
from tokenmill.server.middleware.startup import Startup
from tokenmill.server.middleware.watch import Watch
from tokenmill.server.observability.logs import RequestLog, configure
from tokenmill.server.observability.metrics import Metrics
from tokenmill.server.openapi import describe
from tokenmill.server.service import Service
from tokenmill.server.state import State
from tokenmill.server.tenancy.store import state_folder
from tokenmill.server.tenancy.tenants import Tenants, tenants_opened
from tokenmill.text.dialect import choose

__all__ = ["Server", "create_app", "serve"]

ROUTES: Registry[APIRouter] = Registry("tokenmill.server.routes", "routes", "ROUTER")
"""Groups of endpoints: each module defines ``ROUTER``."""

_logger = logging.getLogger(__name__)

_FLUSH_S = 5.0
"""How long connections may take to send what is already produced, once the engine is idle."""


def create_app(llm: AsyncLLM, config: ServerConfig, metrics: Metrics, tenants: Tenants | None = None) -> FastAPI:
    """The ASGI app. The model need not be loaded yet.

    Args:
        tenants: whom it serves; None is everybody.

    Raises:
        ConfigError: ``unknown_choice`` or ``wrong_parser`` for a parser.
    """
    tenants = tenants or Tenants()
    accounting = tenants.accounting(lambda: llm.max_model_len)
    metrics.add(accounting)
    parsers = (config.tool_parser, config.reasoning_parser)
    choose(None, *parsers)  # a name that does not exist is told now
    app = FastAPI(title="tokenmill", version=tokenmill.__version__, docs_url=None, redoc_url=None)
    app.openapi = functools.partial(describe, app)  # type: ignore[method-assign]
    app.state.service = service = Service(
        llm,
        metrics,
        names=config.served_model_name or (llm.model_name,),
        created=int(time.time()),
        fingerprint=_fingerprint(llm),
        parsers=parsers,
        interceptors=(
            metrics,
            *_tracers(llm, config.observe),
            RequestLog(config.observe.log_prompts),
            accounting,
            Conversations(llm),
        ),
        filters=FilterChain.of(config.filters),
    )
    app.state.scorer = SCORERS.get(config.score_by)
    app.state.tenants = tenants
    app.state.lifecycle = Lifecycle(llm)
    state = State(state_folder(config.store))
    app.state.backlog = Backlog(state, service, Loopback(_endpoints(app.state), tenants.current), config.keep)
    _furnish(app)
    uploads = {"/v1/files": int(config.keep.max_file_mib * 2**20)}
    app.add_middleware(BodyLimit, limit=int(config.max_body_mib * 2**20), uploads=uploads)
    app.add_middleware(Startup, llm=llm)
    app.add_middleware(Access, recognize=tenants.recognize, admin_port=config.access.admin_port)
    app.add_middleware(RequestId)
    app.add_middleware(Watch, metrics=metrics)  # the last one added is the first to see a request
    return app


def _furnish(app: FastAPI) -> None:
    for name in ROUTES.names():
        app.include_router(ROUTES.get(name))
    app.add_exception_handler(TokenmillError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)


def _endpoints(state: AppState) -> FastAPI:
    """The same endpoints for requests that were let in before: no limits, and nobody asks for keys."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state = state
    _furnish(app)
    app.add_middleware(RequestId)
    return app


def _tracers(llm: AsyncLLM, config: ObserveConfig) -> Iterator[Interceptor]:
    """The interceptor that makes traces, if there is somewhere to send them."""
    if config.otlp_endpoint:
        try:
            from tokenmill.server.observability.tracing import (  # and with it opentelemetry, which only this needs
                Tracing,
                export_to,
            )
        except ModuleNotFoundError as error:
            raise MissingDependencyError(error.name or "opentelemetry", "The option otlp_endpoint", "otel") from error
        yield Tracing(export_to(config.otlp_endpoint), llm.events)


def _fingerprint(llm: AsyncLLM) -> str:
    made_of = repr((tokenmill.__version__, llm.config)).encode()
    return f"fp_{hashlib.blake2b(made_of, digest_size=5).hexdigest()}"


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TokenmillError)
    return response_of(error, request.url.path)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    path = request.url.path
    response = response_of(RequestError(code, f"{request.method} {path}: {error.detail}."), path)
    response.headers.update(error.headers or {})
    return response


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A parameter of a URL that the framework itself could not read."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return response_of(RequestError("invalid_parameter", f"{field}: {first['msg']}.", field), request.url.path)


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT; prints one line with the URL when the model is loaded.

    It listens at once: while the model loads, probes answer and requests get 503 ``starting``. The first signal stops
    admission at once (503 ``shutting_down``), lets running requests finish within ``drain_timeout_s`` and then aborts
    them. A second signal aborts them now.

    Returns:
        The exit status, 0 after an orderly end.

    Raises:
        ConfigError: ``address_unavailable``, ``tls_incomplete`` or ``tls_unusable``, before the model is loaded.
        ModelError: from loading the model.
    """
    names = server_config.served_model_name or (engine_config.model.model,)
    config = dataclasses.replace(server_config, served_model_name=names)
    with bind(config) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve_tenants(engine_config, config, listener))


async def _serve_tenants(engine_config: EngineConfig, config: ServerConfig, listener: socket.socket) -> int:
    """Opens what the server knows of those who use it, and the port for administrators if they have their own."""
    configure(config.observe.log_format, config.observe.log_level, config.observe.log_prompts)
    with contextlib.ExitStack() as stack:
        admin = []
        if config.access.admin_port is not None:
            admin.append(stack.enter_context(bind(dataclasses.replace(config, uds="", port=config.access.admin_port))))
        async with tenants_opened(config) as tenants:
            return await _serve(engine_config, config, listener, tenants, admin)


async def _serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    listener: socket.socket,
    tenants: Tenants | None = None,
    more: Sequence[socket.socket] = (),
) -> int:
    metrics = Metrics(config.served_model_name[0], engine_config, config.observe)
    reports = Reports(state_folder(config.store) / "crashes", config.crash_reports)
    llm = AsyncLLM(engine_config, metrics, reports)
    app = create_app(llm, config, metrics, tenants)
    life: Lifecycle = app.state.lifecycle
    server = Server(app, config)
    with _signals(life):
        serving = asyncio.create_task(server.serve(sockets=[listener, *more]))
        try:
            await _unless(life.stopping, llm.load())
            if not life.stopping.is_set():
                seconds = time.time() - psutil.Process().create_time()
                metrics.started(seconds)
                _logger.info("ready", extra={"fields": {"start_s": round(seconds, 3)}})
                await app.state.backlog.start()
                print(f"Serving {config.served_model_name[0]} on {address_of(config, listener)}", flush=True)
                await _unless(life.stopping, asyncio.shield(serving))
            _logger.info("shutting down")
            await app.state.backlog.batches.close()
            await _unless(life.hurry, llm.drain(config.drain_timeout_s))
        finally:
            await llm.close()  # what still runs learns it now, while the server can still tell the clients
            await app.state.backlog.close()
            server.should_exit = True
            await serving
    return 0


async def _unless(event: asyncio.Event, work: Awaitable[Any]) -> Any:
    """The result of `work`, or None when `event` comes first; `work` is then cancelled and has ended."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, waiter):
            pending.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


class Server(uvicorn.Server):
    """Uvicorn with our limits. Signals are not its own.

    Raises:
        ConfigError: ``tls_incomplete`` or ``tls_unusable``.
    """

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        options = uvicorn.Config(
            app,
            http=functools.partial(Connection, config),  # type: ignore[arg-type]  # only called
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=config.keep_alive_s,
            timeout_graceful_shutdown=int(_FLUSH_S),
            **tls_options(config),
        )
        load_tls(options)
        super().__init__(options)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _signals(life: Lifecycle) -> Iterator[None]:
    """While it lasts, SIGTERM and SIGINT end the server."""
    loop = asyncio.get_running_loop()

    def on_signal(*_: Any) -> None:
        loop.call_soon_threadsafe(life.signal)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where there is one."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
