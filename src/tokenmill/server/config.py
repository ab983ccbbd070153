"""Options of the HTTP server."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenmill.config import option
from tokenmill.registry import Registry

__all__ = ["FILTERS", "FilterConfig", "ObserveConfig", "ServerConfig"]

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
    observe: ObserveConfig = dataclasses.field(default_factory=ObserveConfig)
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
