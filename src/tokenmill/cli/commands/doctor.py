"""Tell what this machine is, what will run on it, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from typing import Annotated, Any

import rich
import typer
from rich.markup import escape
from rich.table import Table

import tokenmill
from tokenmill.cli.command import Command
from tokenmill.device import Machine, machine

__all__ = ["COMMAND", "report"]

EXTRAS = {
    "serve": (("fastapi", "uvicorn", "prometheus-client", "sqlalchemy", "alembic"), "tokenmill serve"),
    "postgres": (("pg8000",), "keys and usage in PostgreSQL"),
    "redis": (("redis",), "limits of several servers counted together"),
    "parquet": (("pyarrow",), "tokenmill usage --parquet"),
    "chat": (("prompt_toolkit",), "line editing and history in tokenmill chat"),
    "hf": (("transformers", "huggingface-hub"), "models from the hub and parity tests"),
}
"""Optional packages by extra, and what each extra is for."""

_GIB = 2**30


def report() -> dict[str, Any]:
    """What this machine is and what tokenmill will do with it, as plain JSON values. Reads only."""
    here = machine()
    return {
        "tokenmill": tokenmill.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": dataclasses.asdict(here),
        "torch": _torch(),
        "extras": {name: _extra(packages, purpose) for name, (packages, purpose) in EXTRAS.items()},
    }


def _extra(packages: tuple[str, ...], purpose: str) -> dict[str, Any]:
    missing = [package for package in packages if _version(package) is None]
    return {"for": purpose, "versions": {package: _version(package) for package in packages}, "missing": missing}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any] | None:
    """What torch sees, and which kernel runs for each operation and why; None where torch is not installed."""
    if _version("torch") is None:
        return None
    from tokenmill.kernels import OPS
    from tokenmill.kernels.probe import choose_device, native_isa, probe
    from tokenmill.models.folder import read_config, resolve, resolve_dtype

    device = choose_device("auto")
    kernels = [(op.name, op.active(device)) for op in OPS]
    return {
        **dataclasses.asdict(probe()),
        "device": str(device),
        "dtype": resolve_dtype(read_config(resolve("demo")), "auto"),
        "native": native_isa(),
        "kernels": {name: {"source": active.source, "reason": active.reason} for name, active in kernels},
    }


def run(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> int:
    """Tell what this machine is, what will run on it, and what is missing. Exit code 1 when torch is."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        rich.print(_facts(found, machine()))
        if found["torch"] is not None:
            rich.print(_kernels(found["torch"]))
        for line in _advice(found):
            rich.print(f"[yellow]missing[/yellow] {escape(line)}")
    return 0 if found["torch"] is not None else 1


def _facts(found: dict[str, Any], here: Machine) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_row("tokenmill", f"{found['tokenmill']}, Python {found['python']}, {found['system']}")
    table.add_row("processor", f"{here.processor}, {here.cores} usable cores")
    table.add_row("instructions", " ".join(here.instruction_sets) or "unknown")
    memory = f"{here.memory_bytes / _GIB:.1f} GiB usable, {here.available_bytes / _GIB:.1f} GiB free"
    table.add_row("memory", memory)
    torch = found["torch"]
    if torch is not None:
        table.add_row("torch", f"{torch['torch_version']}, {torch['threads']} threads, {torch['cpu_capability']}")
        for gpu in torch["accelerators"]:
            major, minor = gpu["capability"]
            text = f"{gpu['name']}, {gpu['memory_bytes'] / _GIB:.0f} GiB, compute capability {major}.{minor}"
            table.add_row(gpu["device"], text)
        why = "torch sees no CUDA device" if torch["device"] == "cpu" else "the first CUDA device"
        table.add_row("device", f"{torch['device']} ({why}); --device chooses another")
        table.add_row("native kernels", _native(torch["native"]))
        table.add_row("KV cache", "in the model's type; --kv-dtype int8 keeps it in about half of bfloat16's memory")
        table.add_row("dtype", f"{torch['dtype']} (the built-in model's own type; --dtype chooses another)")
    return table


def _native(isa: str | None) -> str:
    if isa is None:
        return "not built: the plain operators run. A C++20 compiler and a new installation of tokenmill bring them"
    return f"{isa}: bfloat16 models on the CPU with blocks of a multiple of 16 tokens; all others run plain operators"


def _kernels(torch: dict[str, Any]) -> Table:
    table = Table(title=f"Plain operators on {torch['device']}", title_justify="left")
    for column in ("operation", "implementation", "why"):
        table.add_column(column)
    for name, active in torch["kernels"].items():
        table.add_row(name, active["source"], active["reason"])
    return table


def _advice(found: dict[str, Any]) -> list[str]:
    """One line for each thing that is missing, with the command that brings it."""
    lines = []
    if found["torch"] is None:
        lines.append("torch: without it no model runs. pip install torch")
    for name, extra in found["extras"].items():
        if extra["missing"]:
            lines.append(f"{', '.join(extra['missing'])}: for {extra['for']}. pip install 'tokenmill[{name}]'")
    return lines


COMMAND = Command(run)
