"""Which implementation of an operation runs on which device.

An operation is written three ways at most, and the first that fits the device of its tensors is taken:

1. an installed plugin: an entry point of the group ``tokenmill.kernels``, named like the operation, for a module;
2. our own native kernel: the module ``tokenmill.kernels.<backend>.<operation>``, where the backend is ``cpu`` for CPU
   tensors and ``triton`` for CUDA tensors; it is found by its place, no table lists it, and left out where it cannot
   be imported because nothing was compiled;
3. the plain torch reference, which runs on every device and says what the other two must compute.

Modules of kinds 1 and 2 define a function named like the operation, with the reference's signature. A plugin module
also defines ``DEVICES``, the torch device types it serves, for example ``("cuda",)``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Generic, ParamSpec, TypeVar, cast

import torch

from tokenmill.errors import ConfigError

__all__ = ["Implementation", "Op"]

P = ParamSpec("P")
R = TypeVar("R")

_BACKENDS = {"cpu": "cpu", "cuda": "triton"}
"""The folder of native kernels for a torch device type."""


@dataclasses.dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """One way to compute an operation."""

    source: str
    """``reference`` or the dotted name of the module it comes from."""
    devices: tuple[str, ...]
    """Torch device types it serves; empty means every device."""
    reason: str
    """Why it stands where it does in the order of preference, for a person."""
    function: Callable[P, R]

    def serves(self, device: str) -> bool:
        return not self.devices or device in self.devices


class Op(Generic[P, R]):
    """A callable operation. Its implementations are looked up once, at the first call or question.

    Args:
        name: the operation's word, the same as its file's stem.
        reference: the plain torch function; calls are checked against its signature.
    """

    def __init__(self, name: str, reference: Callable[P, R]) -> None:
        self.name = name
        self.reference = reference
        self._implementations: tuple[Implementation[P, R], ...] | None = None
        self._active: dict[str, Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the implementation for the device of the first tensor argument; all tensors share one device."""
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        function = self._active.get(device)
        if function is None:
            function = self._active[device] = self.active(device).function
        return function(*args, **kwargs)

    def active(self, device: torch.device | str) -> Implementation[P, R]:
        """The implementation that runs for tensors on `device`."""
        kind = torch.device(device).type
        return next(implementation for implementation in self.implementations() if implementation.serves(kind))

    def implementations(self) -> tuple[Implementation[P, R], ...]:
        """All implementations, in order of preference; the reference is the last.

        Raises:
            ConfigError: ``broken_plugin`` when a kernel's module lacks what it must define.
        """
        if self._implementations is None:
            reference = Implementation("reference", (), "plain torch, for want of anything faster", self.reference)
            self._implementations = (*self._plugins(), *self._native(), reference)
        return self._implementations

    def _plugins(self) -> list[Implementation[P, R]]:
        found = []
        for entry_point in importlib.metadata.entry_points(group="tokenmill.kernels", name=self.name):
            module = entry_point.load()
            devices = tuple(getattr(module, "DEVICES", ()))
            if not devices:
                raise ConfigError(
                    "broken_plugin", f"The kernel plugin {entry_point.value!r} defines no DEVICES.", "kernels"
                )
            found.append(self._implementation(module, devices, "an installed plugin goes first"))
        return found

    def _native(self) -> list[Implementation[P, R]]:
        found = []
        for device, backend in _BACKENDS.items():
            folder = f"{__package__}.{backend}"
            if importlib.util.find_spec(folder) and importlib.util.find_spec(f"{folder}.{self.name}"):
                try:
                    module = importlib.import_module(f"{folder}.{self.name}")
                except ImportError:  # for want of the compiled module or library it is made of
                    continue
                found.append(self._implementation(module, (device,), f"a native kernel for {device}"))
        return found

    def _implementation(self, module: ModuleType, devices: tuple[str, ...], reason: str) -> Implementation[P, R]:
        if not hasattr(module, self.name):
            raise ConfigError("broken_plugin", f"The kernel {module.__name__!r} defines no {self.name}.", "kernels")
        return Implementation(module.__name__, devices, reason, cast("Callable[P, R]", getattr(module, self.name)))
