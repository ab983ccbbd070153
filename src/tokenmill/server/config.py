"""Options of the HTTP server."""

from __future__ import annotations

import dataclasses

from tokenmill.config import option

__all__ = ["KeepConfig", "ServerConfig", "StoreConfig"]


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """Where the server keeps what outlives it."""

    state: str = option("", "folder for what the server keeps; empty is ~/.local/state/tokenmill")


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """What is kept of files, batches and responses."""

    keep_responses_days: int = option(30, "responses are deleted after so many days; 0 keeps none", low=0)
    max_file_mib: float = option(512.0, "largest file that can be uploaded", low=0.001)
    batch_concurrency: int = option(8, "requests of batches that may run at once", low=1)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and how it stops."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: tuple[str, ...] = option((), "names of the model in the API; none takes the model's own")
    tool_parser: str = option("auto", "how the model writes tool calls: auto, none, or a name from docs/tools.md")
    reasoning_parser: str = option("auto", "how the model writes its thoughts: auto, none, or a name")
    max_body_mib: float = option(32.0, "largest request body", low=0.001)
    drain_timeout_s: float = option(30.0, "how long running requests may go on after SIGTERM", low=0)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    keep: KeepConfig = dataclasses.field(default_factory=KeepConfig)
