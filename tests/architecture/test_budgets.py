"""Sizes that only a decision record in docs/decisions/ raises."""

import ast
from pathlib import Path

import pytest

import tokenmill
from tokenmill.config import options
from tokenmill.engine.config import EngineConfig

PACKAGE = Path(tokenmill.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def _lines(file):
    return len(file.read_text().splitlines())


def _named(files):
    return pytest.mark.parametrize("file", files, ids=[file.relative_to(PACKAGE).as_posix() for file in files])


@_named(FILES)
def test_a_file_has_at_most_600_lines(file):
    assert _lines(file) <= 600


def test_the_scheduler_has_at_most_350_lines():
    assert _lines(PACKAGE / "engine" / "scheduler.py") <= 350


@_named([file for file in FILES if file.parent.name == "families" and file.name != "__init__.py"])
def test_a_family_has_at_most_80_lines(file):
    assert _lines(file) <= 80


@_named([file for file in FILES if "engine" in file.relative_to(PACKAGE).parts])
def test_a_function_of_the_engine_has_at_most_60_lines(file):
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno - node.lineno >= 60}
    assert not long


def test_the_engine_has_at_most_30_options_and_each_is_explained():
    found = options(EngineConfig)
    assert len(found) <= 30
    assert [each.path for each in found if not each.help] == []


def _environment_variables(tree):
    """Names read as os.environ["X"], os.environ.get("X"), os.environ.setdefault("X", ...) or os.getenv("X")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield ast.unparse(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "os.getenv", "os.environ.get", "os.environ.setdefault", "os.environ.pop",
        ):  # fmt: skip
            yield ast.unparse(node.args[0])
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {alias.name for alias in node.names}, "write os.environ"


def test_the_package_reads_at_most_6_environment_variables():
    found = {name for file in FILES for name in _environment_variables(ast.parse(file.read_text()))}
    assert len(found) <= 6, found
    assert "'TOKENMILL_DEBUG'" in found  # the scan sees the one that is known


@_named(FILES)
def test_nothing_is_left_for_later(file):
    text = file.read_text()
    assert not [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text]


def test_no_file_is_called_utils():
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "common", "misc")]
