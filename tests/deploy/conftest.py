"""Programs that the tests of deploy/ need, and the folder itself as a module path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

sys.path[:0] = [str(DEPLOY), str(DEPLOY / "scripts")]


def _program(name: str) -> str:
    """Where a program is. Without it the test is skipped, but not in the pipeline, where .ci/services brings it."""
    places = [os.environ["PATH"], str(Path(sys.executable).parent), str(ROOT / "build" / "tools")]
    if found := shutil.which(name, path=os.pathsep.join(places)):
        return found
    message = f"There is no {name} here; .ci/services and `make setup` install it."
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def prometheus_program() -> str:
    return _program("prometheus")


@pytest.fixture(scope="session")
def promtool() -> str:
    return _program("promtool")


@pytest.fixture(scope="session")
def render():
    """Renders the chart as Helm does: flags of ``helm template`` to resources."""
    import generate

    _program("helm")
    return generate.render


@pytest.fixture(scope="session")
def run():
    """Runs a program to its end and returns its standard output; anything but status 0 fails the test."""

    def _run(name: str, *arguments, cwd: Path = DEPLOY) -> str:
        done = subprocess.run([_program(name), *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return _run
