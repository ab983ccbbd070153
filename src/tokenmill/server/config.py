"""Options of the HTTP server."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenmill.config import option
from tokenmill.registry import Registry

__all__ = ["SCORERS", "ServerConfig"]

SCORERS: Registry[Any] = Registry("tokenmill.server.scorers", "scorers", "SCORER")
"""Ways to score how well texts match: each module defines ``SCORER``, a `server.scoring.Scorer`."""


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and how it stops."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: tuple[str, ...] = option((), "names of the model in the API; none takes the model's own")
    tool_parser: str = option("auto", "how the model writes tool calls: auto, none, or a name from docs/tools.md")
    reasoning_parser: str = option("auto", "how the model writes its thoughts: auto, none, or a name")
    score_by: str = option(
        "embedding", "what rerank and score compare: embeddings, or how likely the model says yes", choices=SCORERS
    )
    max_body_mib: float = option(32.0, "largest request body", low=0.001)
    drain_timeout_s: float = option(30.0, "how long running requests may go on after SIGTERM", low=0)
