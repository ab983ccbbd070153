from pathlib import Path

import pytest

from tokenmill.testing import random_model

pytest_plugins = ["services"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=1000, help="requests that the fuzz tests send (1000)")


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory) -> Path:
    """A random Qwen3 model in fp32 with a byte tokenizer."""
    return random_model(tmp_path_factory.mktemp("model") / "tiny")
