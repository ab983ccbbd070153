"""The folder is the registry: every file of an extension folder is a choice and defines what a choice must define."""

import ast
from pathlib import Path

import pytest

import tokenmill
from tokenmill import kernels
from tokenmill.registry import Registry

PACKAGE = Path(tokenmill.__file__).parent


def _registries():
    """Every `Registry("package", "kind", "ATTRIBUTE")` that the source makes."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Registry":
                yield Registry(*[ast.literal_eval(argument) for argument in node.args])


REGISTRIES = {registry.kind: registry for registry in _registries()}


def _choices():
    return [pytest.param(registry, name, id=f"{kind}-{name}") for kind, registry in REGISTRIES.items()
            for name in registry.names()]  # fmt: skip


def test_every_kind_of_extension_is_found():
    assert {"policies", "batching", "families", "commands", "routes", "parsers"} <= REGISTRIES.keys()


@pytest.mark.parametrize(("registry", "name"), _choices())
def test_a_choice_defines_what_its_kind_must_define(registry, name):
    assert registry.get(name) is not None


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_a_kind_is_an_entry_point_group_named_like_its_folder(registry):
    assert registry.package.rpartition(".")[2] == registry.kind


def test_every_operation_is_a_file_with_a_reference_and_cases():
    files = {file.stem for file in (PACKAGE / "kernels" / "ops").glob("*.py")} - {"__init__"}
    assert {op.name for op in kernels.OPS} == files
    for name in files:
        module = __import__(f"tokenmill.kernels.ops.{name}", fromlist=["reference", "cases"])
        assert callable(module.reference)
        assert list(module.cases()), name
