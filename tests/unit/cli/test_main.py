"""The command line itself, with commands of the test's own in place of the real ones."""

import importlib
import sys
import textwrap

import pytest

from tokenmill.cli import main as cli
from tokenmill.registry import Registry

HEADER = """
    import dataclasses
    from typing import Annotated
    import typer
    from tokenmill.cli.command import Command
    from tokenmill.config import option

    @dataclasses.dataclass(frozen=True)
    class Cache:
        block_size: int = option(16, "tokens per block", low=1)
        sharing: bool = option(True, "whether to share")
        eviction: str = option("lru", "who goes", choices=("lru", "lfu"))

    @dataclasses.dataclass(frozen=True)
    class Engine:
        cache: Cache = dataclasses.field(default_factory=Cache)
        seed: int = option(0, "engine's seed")

    @dataclasses.dataclass(frozen=True)
    class Sampling:
        temperature: float = option(1.0, "how bold")
        stop: tuple[str, ...] = option((), "where to stop")
        seed: int | None = option(None, "sampling's seed")
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Writes a command's file: ``commands(name, body)``. The header above stands before the body."""
    package = tmp_path / "made_up_commands"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", Registry("made_up_commands", "made_up_commands", "COMMAND"))
    monkeypatch.delenv("TOKENMILL_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def write(name, doc, body):
        text = f'"""{doc}"""\n' + textwrap.dedent(HEADER) + textwrap.dedent(body)
        (package / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.startswith("made_up_commands")]:
        del sys.modules[name]


ECHO = """
    def run(
        engine: Engine,
        sampling: Sampling,
        words: Annotated[list[str], typer.Argument(help="What to say.")],
        loud: Annotated[bool, typer.Option("--loud", help="Say it loudly.")] = False,
    ):
        '''Say it back.'''
        print((engine.cache.block_size, engine.cache.sharing, engine.cache.eviction, engine.seed))
        print((sampling.temperature, sampling.stop, sampling.seed, words, loud))

    COMMAND = Command(run, common=("block_size", "temperature", "seed"))
"""


def _call(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return left.value.code


def test_without_flags_the_defaults_hold(commands, capsys):
    commands("echo", "Say it.", ECHO)
    assert _call("echo", "hello") == 0
    assert capsys.readouterr().out == "(16, True, 'lru', 0)\n(1.0, (), None, ['hello'], False)\n"


def test_every_field_of_a_configuration_is_a_flag(commands, capsys):
    commands("echo", "Say it.", ECHO)
    cache = ["--block-size", "32", "--no-sharing", "--eviction", "lfu"]
    assert _call("echo", "hello", *cache, "--temperature", "0.5", "--stop", "a", "--stop", "b", "--loud") == 0
    assert capsys.readouterr().out == "(32, False, 'lfu', 0)\n(0.5, ('a', 'b'), None, ['hello'], True)\n"


def test_of_two_fields_with_one_name_the_last_takes_the_plain_flag(commands, capsys):
    commands("echo", "Say it.", ECHO)
    assert _call("echo", "hello", "--seed", "7", "--engine-seed", "8") == 0
    assert capsys.readouterr().out == "(16, True, 'lru', 8)\n(1.0, (), 7, ['hello'], False)\n"


def test_a_file_lies_below_the_flags_and_above_the_defaults(commands, capsys, tmp_path):
    commands("echo", "Say it.", ECHO)
    file = tmp_path / "a.toml"
    file.write_text(
        "[cache]\nblock-size = 8\nsharing = false\n[engine]\nseed = 3\n[sampling]\nstop = ['x']\n[server]\nport = 1\n"
    )
    assert _call("echo", "hello", "--config", str(file), "--block-size", "4") == 0
    assert capsys.readouterr().out == "(4, False, 'lru', 3)\n(1.0, ('x',), None, ['hello'], False)\n"


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("[cach]\n", "unknown_option", "Did you mean 'cache'"),
        ("[cache]\nblocksize = 1\n", "unknown_option", "Did you mean 'block_size'"),
        ("cache = 3\n", "invalid_option", "section"),
        ("[cache]\nblock_size = 0\n", "invalid_option", "at least 1"),
        ("[cache\n", "config_malformed", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told_and_exits_with_2(commands, capsys, tmp_path, text, code, hint):
    commands("echo", "Say it.", ECHO)
    file = tmp_path / "a.toml"
    file.write_text(text)
    assert _call("echo", "hello", "--config", str(file)) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error[{code}]: ")
    assert hint in told


@pytest.mark.parametrize("flags", [["--block-size", "0"], ["--eviction", "lruu"], ["--block-size", "x"], ["--nothing"]])
def test_a_wrong_flag_exits_with_2_and_without_a_traceback(commands, capsys, flags):
    commands("echo", "Say it.", ECHO)
    assert _call("echo", "hello", *flags) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "rror" in shown.err
    assert "Traceback" not in shown.err


def test_help_shows_the_common_flags_and_help_all_every_one(commands, capsys):
    commands("echo", "Say it.", ECHO)
    assert _call("echo", "--help") == 0
    short = capsys.readouterr().out
    assert _call("echo", "--help-all") == 0
    full = capsys.readouterr().out
    assert "Say it back." in short
    assert "--block-size" in short
    assert "--seed" in short
    assert "--eviction" not in short
    assert "--engine-seed" not in short
    assert "tokenmill echo --help-all" in short
    for flag in (
        "--block-size",
        "--no-sharing",
        "--eviction",
        "--engine-seed",
        "--seed",
        "--stop",
        "--config",
        "--loud",
    ):
        assert flag in full
    assert "tokens per block (16)" in full
    assert "who goes: lru, lfu (lru)" in full


def test_the_list_of_commands_imports_none_of_them(commands, capsys):
    commands("broken", "Break at once.", "raise RuntimeError('imported')")
    commands("two_words", "Be two words.\n\nAnd more.", ECHO)
    assert _call("--help") == 0
    told = capsys.readouterr().out
    assert "Break at once." in told
    assert "two-words" in told
    assert "And more" not in told


def test_only_the_command_asked_for_is_imported(commands, capsys):
    commands("broken", "Break at once.", "raise RuntimeError('imported')")
    commands("echo", "Say it.", ECHO)
    assert _call("echo", "hello") == 0
    assert _call("broken") == 1
    assert "error[internal_error]: RuntimeError: imported" in capsys.readouterr().err


def test_a_misspelt_command_is_answered_with_the_nearest(commands, capsys):
    commands("echo", "Say it.", ECHO)
    assert _call("ehco") == 2
    assert "Did you mean 'echo'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        ("tokenmill.errors.ConfigError('bad_x', 'No.')", 2, "error[bad_x]: No.\n"),
        ("tokenmill.errors.ModelError('bad_x', 'No.')", 2, "error[bad_x]: No.\n"),
        ("tokenmill.errors.RequestError('bad_x', 'No.')", 2, "error[bad_x]: No.\n"),
        ("tokenmill.errors.EngineError('bad_x', 'No.')", 1, "error[bad_x]: No.\n"),
        ("tokenmill.errors.MissingDependencyError('p', 'It', 'serve')", 1, "error[missing_dependency]: It needs"),
        ("ZeroDivisionError('oops')", 1, "error[internal_error]: ZeroDivisionError: oops"),
        ("KeyboardInterrupt()", 130, ""),
    ],
)
def test_how_a_command_fails_is_its_exit_code_and_one_line(commands, capsys, raised, code, told):
    commands("fail", "Fail.", f"import tokenmill.errors\ndef run():\n    raise {raised}\nCOMMAND = Command(run)\n")
    assert _call("fail") == code
    error = capsys.readouterr().err
    assert error.startswith(told)
    assert "Traceback" not in error
    assert bool(error) == bool(told)


def test_debugging_shows_where(commands, monkeypatch):
    commands("fail", "Fail.", "def run():\n    raise ZeroDivisionError('oops')\nCOMMAND = Command(run)\n")
    monkeypatch.setenv("TOKENMILL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_a_command_s_number_is_the_exit_code(commands):
    commands("seven", "Seven.", "def run():\n    return 7\nCOMMAND = Command(run)\n")
    assert _call("seven") == 7


def test_the_version_is_printed(commands, capsys):
    commands("echo", "Say it.", ECHO)
    assert _call("--version") == 0
    assert capsys.readouterr().out.strip() == cli.tokenmill.__version__
