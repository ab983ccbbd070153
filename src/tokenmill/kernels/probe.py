"""What torch sees of this machine: which devices it can compute on, and how. `device` knows the rest without torch."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch

from tokenmill.errors import ConfigError

__all__ = ["Accelerator", "Probe", "choose_device", "native_isa", "probe"]


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One CUDA device."""

    device: str
    """Torch's name for it, for example ``cuda:0``."""
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability."""
    bf16: bool
    """Whether it computes bfloat16 in hardware."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What torch sees."""

    torch_version: str
    threads: int
    """Threads torch uses for one operation on the CPU."""
    cpu_capability: str
    """The vector instruction set that torch's own CPU kernels use."""
    accelerators: tuple[Accelerator, ...]


def probe() -> Probe:
    """Asks torch now. Starts CUDA if there is any."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Probe(
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        accelerators=tuple(_accelerator(index) for index in range(count)),
    )


def _accelerator(index: int) -> Accelerator:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Accelerator(
        device=f"cuda:{index}",
        name=properties.name,
        memory_bytes=properties.total_memory,
        capability=capability,
        bf16=capability >= (8, 0),
    )


def native_isa() -> str | None:
    """The instruction set that the native CPU kernels use on this machine; None where they are not built."""
    if importlib.util.find_spec("tokenmill.kernels.cpu._native") is None:
        return None
    from tokenmill.kernels.cpu import _native

    return str(_native.isa())


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on: ``auto`` is CUDA if torch sees any and the CPU otherwise.

    Raises:
        ConfigError: ``unknown_device`` when torch knows no such device, ``no_such_device`` when it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            "unknown_device", f"{name!r} is not a device. Use auto, cpu, cuda or cuda:<index>.", "device"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            "unknown_device", f"{name!r} is not supported. Use auto, cpu, cuda or cuda:<index>.", "device"
        )
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= present:
        raise ConfigError("no_such_device", f"{name!r} is not here: torch sees {present} CUDA devices.", "device")
    return device
