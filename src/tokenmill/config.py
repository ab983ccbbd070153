"""Frozen configuration: declared as dataclasses next to their owner, built once, never written again.

A field is declared with `option(default, help, ...)`. The command line flags, the TOML keys and the error messages all
come from that one declaration. An unknown key is an error with a suggestion.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenmill.errors import ConfigError, did_you_mean
from tokenmill.registry import Registry

__all__ = ["Option", "build", "flatten", "load_toml", "option", "options"]

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a configuration, as the command line and the documentation see it."""

    path: tuple[str, ...]
    """Where it lives, for example ``("cache", "block_size")``."""
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] | Registry[Any] | None

    @property
    def flag(self) -> str:
        return "--" + self.path[-1].replace("_", "-")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | Registry[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Declares a field: its default, one line of help, and what values are allowed (`low` and `high` inclusive)."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


def options(cls: type, prefix: tuple[str, ...] = ()) -> list[Option]:
    """All fields of a configuration class and of those nested in it, in order of declaration."""
    hints = typing.get_type_hints(cls)
    found: list[Option] = []
    for field in dataclasses.fields(cls):
        hint, path = hints[field.name], (*prefix, field.name)
        if dataclasses.is_dataclass(hint):
            found += options(typing.cast(type, hint), path)
        else:
            meta = field.metadata
            found.append(Option(path, hint, field.default, meta.get("help", ""), meta.get("choices")))
    return found


def build(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Makes a configuration from nested mappings (for example a parsed TOML file).

    Raises:
        ConfigError: ``unknown_option``, ``invalid_option``, or ``unknown_choice``; the field is named in full.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name, full = key.replace("-", "_"), f"{where}.{key}" if where else key
        if name not in fields:
            raise ConfigError("unknown_option", f"There is no option {full!r}. {did_you_mean(name, fields)}", full)
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError("invalid_option", f"{full} is a section, not a value; got {value!r}.", full)
            arguments[name] = build(typing.cast(type, hints[name]), value, full)
        else:
            arguments[name] = _checked(value, hints[name], fields[name].metadata, full)
    return cls(**arguments)


def _checked(value: Any, hint: Any, meta: Mapping[str, Any], full: str) -> Any:
    """`value` as the declared type, or a ConfigError that says what is allowed."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    allowed = [arm for arm in typing.get_args(hint) if arm is not type(None)] if optional else [hint]
    if value is None and optional:
        return None
    kind = typing.get_origin(allowed[0]) or allowed[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise ConfigError("invalid_option", f"{full} must be of type {kind.__name__}; got {value!r}.", full)
    if kind is tuple:
        item = typing.get_args(allowed[0])[0]
        if wrong := [each for each in value if not isinstance(each, item)]:
            raise ConfigError("invalid_option", f"{full} is a list of type {item.__name__}; got {wrong[0]!r}.", full)
    if kind is float and not math.isfinite(value):
        raise ConfigError("invalid_option", f"{full} must be a finite number; got {value}.", full)
    choices = meta.get("choices")
    if isinstance(choices, Registry):
        value = value.replace("-", "_")
        choices = choices.names()
    if choices is not None and value not in choices:
        raise ConfigError("unknown_choice", f"{full} cannot be {value!r}. {did_you_mean(str(value), choices)}", full)
    low, high = meta.get("low"), meta.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError("invalid_option", f"{full} must be {span}; got {value}.", full)
    return value


def flatten(config: Any, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration as ``{"section.key": value}``, for showing what is in effect."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), (*prefix, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, path)
        else:
            flat[".".join(path)] = value
    return flat


def load_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: ``config_not_found`` or ``config_malformed``.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError("config_not_found", f"There is no configuration file {str(path)!r}.", "config") from None
    except OSError as error:
        raise ConfigError("config_not_found", f"{path} cannot be read: {error.strerror}.", "config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config_malformed", f"{path} is not valid TOML: {error}.", "config") from None
