"""Serve a model over an OpenAI-compatible HTTP API.

The server itself is `server/app.py`; this file is its flags.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from tokenmill.cli.command import Command
from tokenmill.engine.config import EngineConfig
from tokenmill.errors import MissingDependencyError
from tokenmill.server.config import ServerConfig

__all__ = ["COMMAND"]


def run(
    engine: EngineConfig,
    server: ServerConfig,
    model: Annotated[str, typer.Argument(help="Built-in demo, a local folder, or a hub id; wins over --model.")] = "",
) -> int:
    """Serve a model over an OpenAI-compatible HTTP API until SIGTERM or Ctrl-C."""
    try:
        from tokenmill.server.app import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tokenmill"):
            raise
        raise MissingDependencyError(error.name, "The server", "serve") from error
    if model:
        engine = dataclasses.replace(engine, model=dataclasses.replace(engine.model, model=model))
    return serve(engine, server)


COMMAND = Command(
    run,
    common=(
        *("host", "port", "served_model_name", "auth", "state"),
        *("dtype", "device", "max_model_len"),
        *("memory_gib", "kv_dtype", "policy", "batching", "max_num_seqs"),
    ),
)
