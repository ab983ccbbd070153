"""The command ``tokenmill``: finds its commands in `cli/commands/` by file name and imports only the one asked for.

Exit codes: 0 done, 1 failed, 2 the input was wrong, 130 interrupted. An error is one line, ``error[code]: message``, on
stderr; with ``TOKENMILL_DEBUG=1`` it comes with its traceback.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import tokenmill
from tokenmill.cli.command import Command
from tokenmill.errors import ConfigError, ModelError, RequestError, TokenmillError, did_you_mean
from tokenmill.registry import Registry

__all__ = ["COMMANDS", "guarded", "main"]

COMMANDS: Registry[Command] = Registry("tokenmill.cli.commands", "commands", "COMMAND")

_SETTINGS = {"help_option_names": ["-h", "--help"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (the process's own by default) and leaves the process with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(guarded(lambda: _run(arguments)))


def guarded(action: Callable[[], int | None]) -> int:
    """The exit code of `action`. Errors are told on stderr, never as a traceback unless TOKENMILL_DEBUG is 1."""
    try:
        return action() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does; Python must not flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("TOKENMILL_DEBUG") == "1":
            raise
        if isinstance(error, TokenmillError):
            print(f"error[{error.code}]: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError | ModelError | RequestError) else 1
        print(
            f"error[internal_error]: {type(error).__name__}: {error} (TOKENMILL_DEBUG=1 shows where)", file=sys.stderr
        )
        return 1


def _run(arguments: list[str]) -> int:
    everything = "--help-all" in arguments
    arguments = ["--help" if word == "--help-all" else word for word in arguments]
    asked = next((word for word in arguments if not word.startswith("-")), None)
    names = COMMANDS.names()
    if asked is not None and asked.replace("-", "_") not in names:
        raise ConfigError("unknown_command", f"There is no command {asked!r}. {did_you_mean(asked, names)}")
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, context_settings=_SETTINGS
    )
    app.callback()(_top)
    for name in names:
        word = name.replace("_", "-")
        if word == (asked or "").replace("_", "-"):
            command = COMMANDS.get(name)
            epilog = None if everything or not command.common else f"All options: tokenmill {word} --help-all"
            app.command(word, help=command.run.__doc__, epilog=epilog)(command.callback(guarded, everything))
        else:
            app.command(word, help=_summary(name))(_nothing)
    try:
        app(arguments, prog_name="tokenmill")
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def _print_version(asked: bool) -> None:
    if asked:
        print(tokenmill.__version__)
        raise typer.Exit()


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """An LLM inference engine that one can see through."""


def _nothing() -> None:
    """Stands in the help for a command that was not asked for."""


def _summary(name: str) -> str:
    """The first line of a command's file, read without importing it."""
    spec = importlib.util.find_spec(f"{COMMANDS.package}.{name}")
    if spec is None or spec.origin is None:
        return "From a plugin."
    with open(spec.origin, encoding="utf-8") as file:
        return (ast.get_docstring(ast.parse(file.read())) or "").partition("\n")[0]
