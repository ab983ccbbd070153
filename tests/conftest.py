from pathlib import Path

import pytest

from tokenmill.testing import random_model

pytest_plugins = ["services"]


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory) -> Path:
    """A random Qwen3 model in fp32 with a byte tokenizer."""
    return random_model(tmp_path_factory.mktemp("model") / "tiny")
