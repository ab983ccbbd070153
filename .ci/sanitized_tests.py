"""Runs the tests of the native kernels with another build of them, once per instruction set: see `sanitize`.

python .ci/sanitized_tests.py FOLDER
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "tokenmill.kernels.cpu._native"
SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


def run(library: Path) -> int:
    import tokenmill.kernels.cpu

    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    tokenmill.kernels.cpu._native = module  # type: ignore[attr-defined]
    print(f"{library.name} with {module.isa()}", flush=True)
    # The tests that start the tests again for each instruction set would do so with the build that is installed.
    return pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not every_instruction_set", "tests/unit/kernels/cpu"])


def main() -> int:
    (library,) = Path(sys.argv[1]).glob("_native*.so")
    if "TOKENMILL_ISA" in os.environ:
        return run(library)
    asking = [sys.executable, "-c", f"import {NAME} as native; print(native.isa())"]
    best = subprocess.run(asking, check=True, capture_output=True, text=True)
    for isa in SETS[: SETS.index(best.stdout.split()[-1]) + 1]:
        ended = subprocess.run([sys.executable, *sys.argv], env={**os.environ, "TOKENMILL_ISA": isa}, check=False)
        if ended.returncode:
            return ended.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
