import json

import pytest

from tokenmill.cli.commands import doctor as command
from tokenmill.cli.main import main
from tokenmill.device import machine
from tokenmill.kernels import OPS


def _doctor(*flags):
    with pytest.raises(SystemExit) as left:
        main(["doctor", *flags])
    return left.value.code


@pytest.fixture
def lacking(monkeypatch):
    """Makes packages look as if they were not installed."""
    installed = command._version

    def lack(*packages):
        monkeypatch.setattr(command, "_version", lambda name: None if name in packages else installed(name))

    return lack


def test_json_tells_the_machine_and_the_kernel_of_every_operation(capsys):
    assert _doctor("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["machine"]["cores"] == machine().cores
    assert told["torch"]["device"] in ("cpu", "cuda")
    assert told["torch"]["dtype"] in ("float32", "bfloat16")
    assert set(told["torch"]["kernels"]) == {op.name for op in OPS}
    assert all(kernel["reason"] for kernel in told["torch"]["kernels"].values())


def test_what_is_missing_comes_with_the_command_that_brings_it(capsys, lacking, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lacking("fastapi")
    assert _doctor() == 0
    shown = capsys.readouterr().out
    assert "fastapi: for tokenmill serve. pip install 'tokenmill[serve]'" in shown
    assert "uvicorn:" not in shown


def test_without_torch_it_still_answers_and_exits_with_1(capsys, lacking, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lacking("torch")
    assert _doctor() == 1
    shown = capsys.readouterr().out
    assert "pip install torch" in shown
    assert machine().processor in shown
