import importlib
import sys

import pytest

from tokenmill.errors import ConfigError
from tokenmill.registry import Registry


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An importable package `shapes` whose files are the choices."""
    package = tmp_path / "shapes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "round_one.py").write_text("SHAPE = 'round'")
    (package / "square.py").write_text("SHAPE = 'square'")
    (package / "empty.py").write_text("")
    (package / "_helper.py").write_text("raise AssertionError('private files are no choices')")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name in ("shapes", "plug") or name.startswith("shapes.")]:
        del sys.modules[name]


SHAPES: Registry[str] = Registry("shapes", "test_shapes", "SHAPE")


@pytest.mark.usefixtures("folder")
def test_listing_names_every_file_and_imports_none():
    assert SHAPES.names() == ("empty", "round_one", "square")
    assert not [name for name in sys.modules if name.startswith("shapes.")]


@pytest.mark.usefixtures("folder")
def test_getting_one_imports_only_that_one():
    assert SHAPES.get("square") == "square"
    assert [name for name in sys.modules if name.startswith("shapes.")] == ["shapes.square"]


@pytest.mark.usefixtures("folder")
def test_dashes_and_underscores_are_the_same():
    assert SHAPES.get("round-one") == SHAPES.get("round_one") == "round"


@pytest.mark.usefixtures("folder")
def test_a_misspelling_is_answered_with_the_nearest_choice():
    with pytest.raises(ConfigError, match="Did you mean 'square'") as caught:
        SHAPES.get("squar")
    assert caught.value.code == "unknown_choice"


@pytest.mark.usefixtures("folder")
def test_a_private_file_is_no_choice():
    with pytest.raises(ConfigError) as caught:
        SHAPES.get("_helper")
    assert caught.value.code == "unknown_choice"


@pytest.mark.usefixtures("folder")
def test_a_file_without_the_attribute_is_broken():
    with pytest.raises(ConfigError, match="defines no SHAPE") as caught:
        SHAPES.get("empty")
    assert caught.value.code == "broken_plugin"


def _install_plugin(folder, target):
    (folder / "plug.py").write_text("SHAPE = 'plugged'")
    info = folder / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tokenmill.test_shapes]\noval_one = {target}\n")
    importlib.invalidate_caches()


def test_an_installed_plugin_is_a_choice_like_the_others(folder):
    _install_plugin(folder, "plug")
    assert SHAPES.names() == ("empty", "oval_one", "round_one", "square")
    assert SHAPES.get("oval-one") == "plugged"


def test_a_plugin_that_cannot_be_imported_is_told_apart_from_a_misspelling(folder):
    _install_plugin(folder, "no_such_module_anywhere")
    with pytest.raises(ConfigError, match="oval_one") as caught:
        SHAPES.get("oval_one")
    assert caught.value.code == "broken_plugin"
