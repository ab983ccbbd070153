"""Write a model with fewer bits to a weight, as a checkpoint that tokenmill, vLLM and transformers read.

The linear layers become int8 (one scale per output) or int4 (groups with a scale and a zero point), stored as
compressed-tensors; embedding, head and norms stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tokenmill.cli.command import Command
from tokenmill.cli.terminal import notes
from tokenmill.compress.calibration import documents, windows
from tokenmill.compress.quantize import Outcome, quantize
from tokenmill.errors import ConfigError, did_you_mean
from tokenmill.models.folder import resolve
from tokenmill.quant.method import METHODS
from tokenmill.quant.scheme import Scheme
from tokenmill.text.tokenizer import Tokenizer

__all__ = ["COMMAND"]

_FORMATS = ("int4", "int8")
_GROUPS = (32, 64, 128)


def run(
    model: Annotated[str, typer.Argument(help="`demo`, a folder, or a Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    format: Annotated[str, typer.Option(metavar="NAME", help="int4 or int8.")] = "int4",
    method: Annotated[str, typer.Option(metavar="NAME", help="gptq (calibrated) or rtn (rounds to nearest).")] = "gptq",
    group: Annotated[int, typer.Option(metavar="N", help="Inputs that share a scale in int4: 32, 64 or 128.")] = 32,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text (.txt or .jsonl) for gptq. Python's library by default.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Pieces of text to calibrate with.")] = 128,
    length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens in each piece.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Write a model with fewer bits to a weight as a checkpoint in compressed-tensors layout."""
    if format not in _FORMATS:
        raise ConfigError(
            "unknown_choice", f"There is no format {format!r}. {did_you_mean(format, _FORMATS)}", "format"
        )
    if group not in _GROUPS:
        raise ConfigError("unknown_choice", f"Groups have 32, 64 or 128 inputs, not {group}.", "group")
    scheme = Scheme("int-quantized", 8, 0, True) if format == "int8" else Scheme("pack-quantized", 4, group, False)
    calibrated = METHODS.get(method).calibrated
    if calibration is not None and not calibrated:
        raise ConfigError("invalid_option", f"{method} rounds without a calibration text.", "calibration")
    started, path = time.perf_counter(), resolve(model)
    pieces: list[list[int]] = []
    if calibrated:
        tokenizer = Tokenizer.load(path)
        pieces = windows(documents(calibration, tokenizer), tokenizer, samples, length)
    columns = (TextColumn("Quantizing {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        line = bar.add_task(escape(model), total=None)
        outcome = quantize(
            path, out, scheme, method, pieces, lambda done, total: bar.update(line, completed=done, total=total)
        )
    told = {
        "model": model,
        "out": str(out),
        "format": format,
        "method": method,
        "group": scheme.group,
        **dataclasses.asdict(outcome),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if as_json:
        print(json.dumps(told))
    else:
        rich.print(_summary(out, outcome, time.perf_counter() - started))
    return 0


def _summary(out: Path, outcome: Outcome, seconds: float) -> str:
    calibrated = f", calibrated on {outcome.calibration_tokens:,} tokens" if outcome.calibration_tokens else ""
    return (
        f"{outcome.weights:,} weights of {outcome.bits_per_weight:.2f} bits{calibrated}; {outcome.bytes / 1e6:,.1f} MB "
        f"in {escape(str(out))} after {seconds:.0f} s"
    )


COMMAND = Command(run)
