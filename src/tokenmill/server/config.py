"""Options of the HTTP server."""

from __future__ import annotations

import dataclasses

from tokenmill.config import option

__all__ = ["ServerConfig"]


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, what a client may take of it, and how it stops."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    uds: str = option("", "path of a unix socket to listen on instead; owner and group may connect")
    tls_cert: str = option("", "PEM file with the certificate and its chain; set, the server speaks only TLS")
    tls_key: str = option("", "PEM file with the certificate's key; empty when it is in the same file")
    tls_client_ca: str = option("", "PEM file of the authorities that clients need a certificate from; empty asks none")
    served_model_name: tuple[str, ...] = option((), "names of the model in the API; none takes the model's own")
    tool_parser: str = option("auto", "how the model writes tool calls: auto, none, or a name from docs/tools.md")
    reasoning_parser: str = option("auto", "how the model writes its thoughts: auto, none, or a name")
    max_body_mib: float = option(32.0, "largest request body", low=0.001)
    max_header_kib: int = option(32, "largest request head: line and headers", low=1)
    max_connections: int = option(1024, "open connections; those beyond are answered with 503", low=1)
    body_timeout_s: float = option(60.0, "time for a request to arrive, from its first byte to its last", low=0.1)
    write_timeout_s: float = option(60.0, "a client that reads nothing for this long is cut off", low=0.1)
    keep_alive_s: int = option(75, "how long an idle connection stays open; more than the load balancer's", low=1)
    drain_timeout_s: float = option(30.0, "how long running requests may go on after SIGTERM", low=0)
    crash_dir: str = option(
        "~/.local/state/tokenmill/crashes", "folder for reports about crashes of the engine; empty writes none"
    )
