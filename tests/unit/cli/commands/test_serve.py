import builtins
import sys
import types

import pytest

from tokenmill.cli.main import main


@pytest.fixture
def served(monkeypatch):
    """What `server.app.serve` was called with; it returns 3."""
    calls = []
    fake = types.ModuleType("tokenmill.server.app")
    fake.serve = lambda engine, server: calls.append((engine, server)) or 3
    monkeypatch.setitem(sys.modules, "tokenmill.server.app", fake)
    return calls


def _serve(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["serve", *arguments])
    return left.value.code


def test_the_flags_become_the_configurations_and_the_server_s_code_the_exit_code(served):
    assert _serve("--port", "0", "--policy", "priority", "--block-size", "8", "--model", "a") == 3
    engine, server = served[0]
    assert (server.port, engine.scheduler.policy, engine.cache.block_size, engine.model.model) == (
        0,
        "priority",
        8,
        "a",
    )


def test_the_model_may_stand_alone(served):
    _serve("some/folder", "--model", "other")
    assert served[0][0].model.model == "some/folder"


def test_without_the_server_s_packages_it_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def without_fastapi(name, *rest, **more):
        if name == "tokenmill.server.app":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_fastapi)
    assert _serve() == 1
    assert "pip install 'tokenmill[serve]'" in capsys.readouterr().err
