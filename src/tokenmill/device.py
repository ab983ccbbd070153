"""Facts about this machine, read from the operating system. No torch: probing a GPU belongs to `kernels.probe`."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import psutil

__all__ = ["Machine", "machine"]

# Instruction sets that kernels choose between, by the name Linux gives them.
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this process may use: container limits and CPU affinity are taken into account."""

    processor: str
    cores: int
    """CPU cores this process may run on, limited by affinity and by the cgroup's quota."""
    memory_bytes: int
    """Memory this process may use at most."""
    available_bytes: int
    """Memory that can be taken now without swapping."""
    instruction_sets: tuple[str, ...]


def machine() -> Machine:
    """Reads the facts now. Linux gives all of them; elsewhere the cgroup and instruction sets are left out."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    memory = psutil.virtual_memory()
    limit, used = _cgroup_memory()
    return Machine(
        processor=info.get("model name", platform.processor() or platform.machine()),
        cores=_usable_cores(),
        memory_bytes=min(memory.total, limit),
        available_bytes=min(memory.available, max(0, limit - used)),
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
    )


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _usable_cores() -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()  # cgroup v2: "<quota> <period>" or "max <period>"
    if len(quota) == 2 and quota[0].isdigit():
        affinity = min(affinity, max(1, round(int(quota[0]) / int(quota[1]))))
    return affinity


def _cgroup_memory() -> tuple[int, int]:
    """Bytes this container may use, and those it uses now and could not give back by dropping cached files."""
    root = "/sys/fs/cgroup"
    for limit, usage, stat, cached in (
        (f"{root}/memory.max", f"{root}/memory.current", f"{root}/memory.stat", "inactive_file"),
        # cgroup v1
        (
            f"{root}/memory/memory.limit_in_bytes",
            f"{root}/memory/memory.usage_in_bytes",
            f"{root}/memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        if (text := _read(limit)).isdigit():
            counts = dict(line.split() for line in _read(stat).splitlines())
            return int(text), max(0, int(_read(usage) or 0) - int(counts.get(cached, 0)))
    return 2**63, 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
