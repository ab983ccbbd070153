"""A folder whose files are the choices.

The file's stem is the word the user types. Listing the choices imports nothing; getting one imports only that one; a
misspelling lists the choices. Third parties add choices through the entry point group ``tokenmill.<kind>``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from typing import Generic, TypeVar, cast

from tokenmill.errors import ConfigError, did_you_mean

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The choices of one kind.

    Args:
        package: dotted name of the folder, for example ``tokenmill.engine.policies``.
        kind: the last part of the entry point group, for example ``policies``.
        attribute: the name each module must define, for example ``POLICY``.
    """

    def __init__(self, package: str, kind: str, attribute: str) -> None:
        self.package = package
        self.kind = kind
        self.attribute = attribute

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {ep.name: ep for ep in importlib.metadata.entry_points(group=f"tokenmill.{self.kind}")}

    def _own(self) -> set[str]:
        # The parent package of a registry holds no code, so importing it costs nothing.
        path = importlib.import_module(self.package).__path__
        return {module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")}

    def names(self) -> tuple[str, ...]:
        """All choices, sorted. Imports none of them."""
        return tuple(sorted(self._own() | self._entry_points().keys()))

    def get(self, name: str) -> T:
        """The choice called `name` (``-`` and ``_`` are the same).

        Raises:
            ConfigError: ``unknown_choice`` when there is none, ``broken_plugin`` when its module lacks the attribute
                or cannot be imported (plugins).
        """
        stem = name.replace("-", "_")
        if stem in self._own():
            module = importlib.import_module(f"{self.package}.{stem}")
        elif entry_point := self._entry_points().get(stem):
            try:
                module = entry_point.load()
            except Exception as error:
                raise ConfigError(
                    "broken_plugin",
                    f"{self.kind} {name!r} ({entry_point.value}) cannot be loaded: {type(error).__name__}: {error}.",
                    self.kind,
                ) from error
        else:
            raise ConfigError(
                "unknown_choice", f"There is no {name!r} in {self.kind}. {did_you_mean(stem, self.names())}", self.kind
            )
        if not hasattr(module, self.attribute):
            raise ConfigError(
                "broken_plugin", f"{self.kind} {name!r} ({module.__name__}) defines no {self.attribute}.", self.kind
            )
        return cast(T, getattr(module, self.attribute))
