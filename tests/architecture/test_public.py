"""The names others may build on. Changing this list is a decision, not an accident."""

import re
import tomllib
from pathlib import Path

import pytest

import tokenmill

PUBLIC = [
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


def test_the_public_names_are_pinned():
    assert sorted(tokenmill.__all__) == PUBLIC
    assert dir(tokenmill) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_imported_from_its_home(name):
    value = getattr(tokenmill, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("tokenmill.")


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = tokenmill.Engine


def test_the_version_is_the_one_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert tokenmill.__version__ == project["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tokenmill.__version__)
