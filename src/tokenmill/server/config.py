"""Options of the HTTP server."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenmill.config import option
from tokenmill.registry import Registry

__all__ = [
    "FILTERS",
    "SCORERS",
    "AccessConfig",
    "FilterConfig",
    "KeepConfig",
    "ObserveConfig",
    "ServerConfig",
    "StoreConfig",
    "UsageConfig",
]

FILTERS: Registry[Any] = Registry("tokenmill.server.filters", "filters", "FILTER")
"""Content filters: each module defines ``FILTER``, which makes a `tokenmill.server.filter.Filter` of the options."""


@dataclasses.dataclass(frozen=True)
class ObserveConfig:
    """What the server tells about its work."""

    log_format: str = option("text", "how log lines are written", choices=("text", "json"))
    log_level: str = option("info", "the least level of log lines shown", choices=("debug", "info", "warning", "error"))
    log_prompts: bool = option(False, "whether prompts and answers may appear in logs")
    legacy_metrics: bool = option(False, "export metrics under the names that vLLM has given up, too")
    ttft_slo_ms: float = option(0.0, "time to first token that counts as good; 0 none", low=0)
    tpot_slo_ms: float = option(0.0, "time per token after the first that counts as good; 0 none", low=0)
    otlp_endpoint: str = option("", "where traces go by OTLP over HTTP, http://host:4318/v1/traces; empty nowhere")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What is kept out of prompts and answers."""

    filters: tuple[str, ...] = option((), "content filters in the order they see a text: pii, banned, moderation")
    banned_patterns: str = option("", "file of the filter banned: one regular expression per line")
    moderation_url: str = option("", "endpoint of the filter moderation, with OpenAI's /v1/moderations form")
    moderation_key_file: str = option("", "file with the key of that endpoint; empty sends none")
    moderation_timeout_s: float = option(5.0, "how long that endpoint may take", low=0.01)
    moderation_open: bool = option(False, "whether texts pass while that endpoint fails")


SCORERS: Registry[Any] = Registry("tokenmill.server.scorers", "scorers", "SCORER")
"""Ways to score how well texts match: each module defines ``SCORER``, a `server.scoring.Scorer`."""


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """Where the server keeps what outlives it."""

    state: str = option("", "folder for what the server keeps; empty is ~/.local/state/tokenmill")
    database: str = option("", "postgresql://... for keys and usage; empty is an SQLite file in the state folder")


@dataclasses.dataclass(frozen=True)
class AccessConfig:
    """Who may ask for what."""

    auth: bool = option(False, "whether a key is needed; see `tokenmill keys`")
    salt_caches: bool = option(True, "whether keys are kept from sharing cached prefixes")
    admin_port: int | None = option(None, "port for /admin and /metrics, instead of the public one", low=1, high=65535)
    redis: str = option("", "redis://... to count limits for several servers together; empty counts in memory")


@dataclasses.dataclass(frozen=True)
class UsageConfig:
    """What is written down about requests, and what they cost."""

    ledger: bool = option(True, "whether tokens, times and cost of each request are written to the database")
    keep_usage_days: int = option(400, "usage older than so many days is deleted", low=1, high=36_500)
    dollars_per_hour: float = option(0.0, "price of this machine, shared by the requests that are in it", low=0)
    dollars_per_million_input: float = option(0.0, "price of prompt tokens", low=0)
    dollars_per_million_output: float = option(0.0, "price of generated tokens", low=0)


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """What is kept of files, batches and responses."""

    keep_responses_days: int = option(30, "responses are deleted after so many days; 0 keeps none", low=0)
    max_file_mib: float = option(512.0, "largest file that can be uploaded", low=0.001)
    batch_concurrency: int = option(8, "requests of batches that may run at once", low=1)


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
    score_by: str = option(
        "embedding", "what rerank and score compare: embeddings, or how likely the model says yes", choices=SCORERS
    )
    max_body_mib: float = option(32.0, "largest request body", low=0.001)
    max_header_kib: int = option(32, "largest request head: line and headers", low=1)
    max_connections: int = option(1024, "open connections; those beyond are answered with 503", low=1)
    body_timeout_s: float = option(60.0, "time for a request to arrive, from its first byte to its last", low=0.1)
    write_timeout_s: float = option(60.0, "a client that reads nothing for this long is cut off", low=0.1)
    keep_alive_s: int = option(75, "how long an idle connection stays open; more than the load balancer's", low=1)
    drain_timeout_s: float = option(30.0, "how long running requests may go on after SIGTERM", low=0)
    crash_reports: int = option(
        20, "reports about crashes of the engine that are kept in the state folder; 0 writes none", low=0
    )
    observe: ObserveConfig = dataclasses.field(default_factory=ObserveConfig)
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    keep: KeepConfig = dataclasses.field(default_factory=KeepConfig)
    access: AccessConfig = dataclasses.field(default_factory=AccessConfig)
    usage: UsageConfig = dataclasses.field(default_factory=UsageConfig)
