"""A command is a function; its flags are read off its signature.

A parameter whose type is a configuration (a frozen dataclass, see `tokenmill.config`) becomes one flag per field, plus
``--config FILE``, a TOML file whose sections lie below the flags. Every other parameter is an argument or flag of the
command itself, declared the way typer wants it. So an option exists once, at its owner, and every command that takes
its configuration has it.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tokenmill.config import Option, build, load_toml, options
from tokenmill.errors import ConfigError, did_you_mean
from tokenmill.registry import Registry

__all__ = ["Command", "build_all", "signature", "values"]

FILE_SECTIONS = frozenset({"model", "cache", "scheduler", "engine", "server", "store", "access", "usage", "sampling"})
"""Sections that a configuration file may have. A command skips those it has no use for: one file serves them all."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a file in `cli/commands/` defines as ``COMMAND``.

    Args:
        run: does the work and returns the exit code (None is 0). Its parameters are the flags.
        common: names of the configuration fields that ``--help`` shows; ``--help-all`` shows every one.
    """

    run: Callable[..., int | None]
    common: tuple[str, ...] = ()

    def callback(self, guard: Callable[[Callable[[], int | None]], int], everything: bool) -> Callable[..., None]:
        """The function to hand to typer: parses the flags back into configurations and runs the command.

        Args:
            guard: turns a call into an exit code and reports its errors.
            everything: whether the help shows the flags that are not common too.
        """
        configurations = _configurations(self.run)

        def called(**given: Any) -> None:
            def action() -> int | None:
                settings = build_all(configurations, given)
                return self.run(**settings, **{name: given[name] for name in given if name in own})

            raise typer.Exit(guard(action))

        own = {p.name for p in _parameters(self.run) if p.name not in configurations}
        called.__signature__ = signature(self.run, self.common, everything)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in called.__signature__.parameters.values()}  # type: ignore[attr-defined]
        return called


def signature(run: Callable[..., Any], common: tuple[str, ...], everything: bool) -> inspect.Signature:
    """`run`'s signature as typer reads it: its configurations are replaced by one flag for each of their fields."""
    configurations = _configurations(run)
    parameters = [p for p in _parameters(run) if p.name not in configurations]
    found = [(section, each) for name, cls in configurations.items() for section, each in _sections(name, options(cls))]
    owner = {each.flag: section for section, each in found}
    for section, each in found:
        # Where two sections have a field of one name, the last takes the plain flag and the other says its section.
        flag = each.flag if owner[each.flag] == section else f"--{section}-{each.flag[2:]}"
        hidden = not everything and (each.path[-1] not in common or flag != each.flag)
        parameters.append(_parameter(section, each, flag, everything, hidden))
    if configurations:
        declared = typer.Option("--config", metavar="FILE", help="TOML file with options; flags win.")
        parameters.append(_keyword("config", Annotated[Path | None, declared], None))
    return inspect.Signature(parameters)


def build_all(configurations: Mapping[str, type], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every configuration from the file named by ``given["config"]``, overridden by the flags that were given.

    Raises:
        ConfigError: ``unknown_option`` and the others of `tokenmill.config.build`.
    """
    file = load_toml(given["config"]) if given.get("config") else {}
    if unknown := file.keys() - FILE_SECTIONS:
        word = min(unknown)
        raise ConfigError(
            "unknown_option", f"There is no section [{word}]. {did_you_mean(word, FILE_SECTIONS)}", "config"
        )
    return {name: build(cls, values(name, cls, file, given)) for name, cls in configurations.items()}


def values(name: str, cls: type, file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping that `tokenmill.config.build` takes for the configuration `cls` of the parameter `name`.

    A nested configuration's section is the field it is in; fields that are not nested are in the section `name`.
    """
    found = _sections(name, options(cls))
    merged: dict[str, dict[str, Any]] = {}
    for section in dict.fromkeys(section for section, _ in found):
        own = file.get(section, {})
        if not isinstance(own, Mapping):
            raise ConfigError("invalid_option", f"{section} is a section, not a value; got {own!r}.", section)
        merged[section] = {key.replace("-", "_"): value for key, value in own.items()}
    for section, each in found:
        value = given.get(_identifier(section, each))
        if value is not None and value != []:
            merged[section][each.path[-1]] = value
    return merged.pop(name, {}) | merged


def _parameters(run: Callable[..., Any]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(run, include_extras=True)
    return [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(run).parameters.values()
    ]


def _configurations(run: Callable[..., Any]) -> dict[str, type]:
    return {p.name: p.annotation for p in _parameters(run) if _is_configuration(p.annotation)}


def _is_configuration(annotation: Any) -> typing.TypeGuard[type]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _sections(name: str, found: list[Option]) -> list[tuple[str, Option]]:
    """Each option with its section in the file: the field it is nested in, or the parameter's own name."""
    return [(each.path[0] if len(each.path) > 1 else name, each) for each in found]


def _identifier(section: str, each: Option) -> str:
    return f"{section}_{each.path[-1]}"


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(section: str, each: Option, flag: str, everything: bool, hidden: bool) -> inspect.Parameter:
    """One flag. Its own default is None, "not given", so that the file's value is not overridden by a default."""
    plain = _plain_type(each.type)
    choices = each.choices.names() if isinstance(each.choices, Registry) else each.choices or ()
    declared = typer.Option(
        f"{flag}/--no-{flag[2:]}" if plain is bool else flag,
        help=escape(_help(each, choices, everything)),
        metavar=None if plain is bool else "NAME" if choices else _METAVARS[plain],
        hidden=hidden,
        show_default=False,
        rich_help_panel=section.capitalize() if everything else "Common options",
    )
    annotation = list[str] | None if plain is tuple else plain | None
    return _keyword(_identifier(section, each), Annotated[annotation, declared], None)


def _help(each: Option, choices: tuple[str, ...], everything: bool) -> str:
    """One line about an option: what it is, the choices if they fit, and the default."""
    shown = ", ".join(choices if everything or len(choices) <= 4 else (*choices[:3], "..."))
    default = each.default if isinstance(each.default, str | int | float) and each.default != "" else None
    return each.help + (f": {shown}" if shown else "") + ("" if default is None else f" ({_word(default)})")


def _word(default: str | float) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default}"


_METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "TEXT"}


def _plain_type(hint: Any) -> type:
    """``int``, ``float``, ``bool``, ``str`` or ``tuple`` behind ``X | None`` and ``tuple[str, ...]``."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    return typing.cast(type, typing.get_origin(hint) or hint)
