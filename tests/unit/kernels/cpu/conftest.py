"""Every test file of the native kernels runs once per instruction set that the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def run_tests_with_isa() -> Callable[[str, str], None]:
    """Runs a test file in a process with TOKENMILL_ISA set; skips what this machine lacks or runs anyway."""

    def run(isa: str, path: str) -> None:
        native = pytest.importorskip("tokenmill.kernels.cpu._native")
        if isa == native.isa() or os.environ.get("TOKENMILL_ISA"):
            pytest.skip(f"these tests run with {native.isa()} already")
        environment = {**os.environ, "TOKENMILL_ISA": isa}
        question = [sys.executable, "-c", "import tokenmill.kernels.cpu._native as native; print(native.isa())"]
        answer = subprocess.run(question, env=environment, capture_output=True, text=True)
        if "this machine has only" in answer.stderr:
            pytest.skip(f"this machine has no {isa}")
        assert answer.stdout.strip() == isa, answer.stderr
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
        tests = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr[-1000:]

    return run
