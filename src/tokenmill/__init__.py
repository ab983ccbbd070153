"""An LLM inference engine that one can see through, and the workbench that makes it cheaper.

    from tokenmill import LLM, SamplingParams

    llm = LLM("demo")
    print(llm.chat([{"role": "user", "content": "What is 17 + 25?"}], SamplingParams(max_tokens=16))[0].outputs[0].text)

The names below are the public interface. Each is imported when first used, so that ``import tokenmill`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.engine.config import CacheConfig, EngineConfig, SchedulerConfig
    from tokenmill.errors import (
        ConfigError,
        EngineError,
        MissingDependencyError,
        ModelError,
        RequestError,
        TokenmillError,
        UnavailableError,
    )
    from tokenmill.llm import LLM, AsyncLLM
    from tokenmill.models.config import ModelConfig
    from tokenmill.types import (
        CompletionOutput,
        FinishReason,
        PoolingParams,
        RequestOutput,
        RequestStats,
        SamplingParams,
        StructuredOutput,
    )

__all__ = [
    "AsyncLLM",
    "CacheConfig",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineError",
    "FinishReason",
    "LLM",
    "MissingDependencyError",
    "ModelConfig",
    "ModelError",
    "PoolingParams",
    "RequestError",
    "RequestOutput",
    "RequestStats",
    "SamplingParams",
    "SchedulerConfig",
    "StructuredOutput",
    "TokenmillError",
    "UnavailableError",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "tokenmill.engine.config": ("CacheConfig", "EngineConfig", "SchedulerConfig"),
    "tokenmill.errors": (
        "ConfigError",
        "EngineError",
        "MissingDependencyError",
        "ModelError",
        "RequestError",
        "TokenmillError",
        "UnavailableError",
    ),
    "tokenmill.llm": ("AsyncLLM", "LLM"),
    "tokenmill.models.config": ("ModelConfig",),
    "tokenmill.types": (
        "CompletionOutput",
        "FinishReason",
        "PoolingParams",
        "RequestOutput",
        "RequestStats",
        "SamplingParams",
        "StructuredOutput",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokenmill' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
