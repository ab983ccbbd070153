"""Show who used how many tokens, and what they cost.

Reads the ledger that `tokenmill serve` writes, by key, model, day or request.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.markup import escape
from rich.table import Table

from tokenmill.cli.command import Command
from tokenmill.errors import ConfigError, MissingDependencyError
from tokenmill.server.config import StoreConfig
from tokenmill.types import JSON

__all__ = ["COMMAND"]

_SHOWN = 1000


def run(
    store: StoreConfig,
    by: Annotated[str, typer.Option(metavar="NAME", help="key, model, day or request.")] = "key",
    since: Annotated[str | None, typer.Option(metavar="DAY", help="First day, as 2026-11-25, UTC.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Last day.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as CSV.")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as Parquet.")] = None,
) -> int:
    """Show who used how many tokens, and what they cost."""
    if sum((as_json, csv is not None, parquet is not None)) > 1:
        raise ConfigError("invalid_option", "Choose one of --json, --csv and --parquet.", "json")
    try:
        from tokenmill.server.tenancy import usage
        from tokenmill.server.tenancy.store import Store
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tokenmill"):
            raise
        raise MissingDependencyError(error.name, "The usage ledger", "serve") from error
    with contextlib.closing(Store(store)) as opened:
        opened.migrate()
        found = usage.rows(opened, by, since, until)
        try:
            if csv is not None:
                with csv.open("w", newline="", encoding="utf-8") as file:
                    usage.write_csv(file, found)
            elif parquet is not None:
                usage.write_parquet(parquet, found)
        except OSError as error:
            raise ConfigError("file_unwritable", f"{csv or parquet} cannot be written: {error.strerror}.") from error
        if as_json:
            print(json.dumps(list(found)))
        elif csv is None and parquet is None:
            _show(found)
    return 0


def _show(found: Iterable[JSON]) -> None:
    rows = list(itertools.islice(found, _SHOWN + 1))
    if not rows:
        rich.print("Nothing was used.")
        return
    table = Table(box=None)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows[:_SHOWN]:
        table.add_row(*(_cell(value) for value in row.values()))
    rich.print(table)
    if len(rows) > _SHOWN:
        rich.print(f"Only {_SHOWN} rows are shown. --csv FILE and --parquet FILE write all of them.")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


COMMAND = Command(run, common=("state", "database"))
