"""What the documents name exists: commands, flags, make targets, files, links; their code compiles and imports."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from tokenmill.cli.command import FILE_SECTIONS
from tokenmill.cli.main import COMMANDS, guarded

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
DOCUMENTS += [f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")) if file.name != "log.md"]
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}


def _blocks(language):
    """Fenced code of one language, as pytest parameters."""
    return [
        pytest.param(code, id=f"{name}-{number}")
        for name, text in TEXTS.items()
        for number, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    ]


def _lines(first_word):
    """Command lines that begin with a word, in sh blocks and in inline code."""
    found = []
    for name, text in TEXTS.items():
        blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for line in [*blocks.splitlines(), *inline]:
            if line.split()[:1] == [first_word]:
                words = shlex.split(line, comments=True)
                found.append(pytest.param(words[1:], id=f"{name}-{' '.join(words)}"))
    return found


def _flags(name):
    app = typer.Typer()
    app.command(name)(COMMANDS.get(name).callback(guarded, True))
    parameters = typer.main.get_command(app).params
    flags = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags | {"--help", "--help-all"}


@pytest.mark.parametrize("words", _lines("tokenmill"))
def test_every_command_and_flag_that_is_named_exists(words):
    if words[:1] in ([], ["--help"]):
        return
    flags = _flags(words[0])
    assert [word for word in words[1:] if word.startswith("--") and word not in flags] == []


def test_every_flag_that_stands_alone_belongs_to_a_command():
    known = set().union(*(_flags(name) for name in COMMANDS.names()))
    named = {flag for text in TEXTS.values() for flag in re.findall(r"`(--[a-z-]+)[^`]*`", text)}
    assert named - known - {"--build-arg"} == set()  # which is docker's


@pytest.mark.parametrize("words", _lines("make"))
def test_every_make_target_that_is_named_exists(words):
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [word for word in words[:1] if word not in targets] == []


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_compiles_and_imports_what_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_policy_in_the_recipe_is_a_policy():
    recipe = next(code for code in re.findall(r"```python\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.DOTALL))
    names: dict = {}
    exec(compile(recipe, "CONTRIBUTING.md", "exec"), names)
    policy = importlib.import_module("tokenmill.engine.policy").Policy
    assert issubclass(names["POLICY"], policy)
    assert not names["POLICY"].__abstractmethods__


@pytest.mark.parametrize("code", _blocks("toml"))
def test_toml_parses(code):
    assert tomllib.loads(code)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name])
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_exists(name):
    named = re.findall(r"`([\w./]+/[\w.]*)`", TEXTS[name])
    homes = (ROOT, ROOT / "src", ROOT / "src" / "tokenmill")
    written = [
        path for path in named if not path.startswith(("/", ".")) and not any((h / path).exists() for h in homes)
    ]
    assert written == []


def test_the_sections_of_a_configuration_file_are_those_the_readme_lists():
    sentence = re.search(r"with the sections\n(.*?); flags win", TEXTS["README.md"], re.DOTALL)
    assert set(re.findall(r"`\[(\w+)\]`", sentence[1])) == FILE_SECTIONS


def test_every_extension_folder_has_its_recipe():
    for folder in (
        "engine/policies",
        "engine/batching",
        "models/families",
        "cli/commands",
        "server/routes",
        "kernels/ops",
    ):
        assert f"`src/tokenmill/{folder}/<" in TEXTS["CONTRIBUTING.md"]
