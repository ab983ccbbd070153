"""What the usage ledger tells: sums by key, model or day, and the requests themselves; as rows, CSV and Parquet."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy

from tokenmill.errors import MissingDependencyError, RequestError, UnavailableError, did_you_mean
from tokenmill.server.tenancy.store import DATABASE_ERRORS, KEYS, USAGE, Store
from tokenmill.types import JSON

__all__ = ["GROUPS", "rows", "write_csv", "write_parquet"]

GROUPS = ("key", "model", "day", "request")

_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens", "rejected_tokens")
_AT_ONCE = 1000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet would take for the begin of a formula."""


def rows(store: Store, by: str, since: str | None = None, until: str | None = None) -> Iterator[JSON]:
    """Usage, one row per key, model, day or request.

    Args:
        by: one of `GROUPS`.
        since: first UTC day, as ``2026-11-25``; None is the first there is.
        until: last UTC day.

    Raises:
        RequestError: ``invalid_parameter``.
        UnavailableError: ``database_unavailable``.
    """
    if by not in GROUPS:
        raise RequestError("invalid_parameter", f"Usage is not kept by {by!r}. {did_you_mean(by, GROUPS)}", "by")
    statement = _requests() if by == "request" else _sums(by)
    for field, day in (("since", since), ("until", until)):
        if day is not None:
            _check_day(field, day)
    if since is not None:
        statement = statement.where(USAGE.c.day >= since)
    if until is not None:
        statement = statement.where(USAGE.c.day <= until)
    try:
        with store.reading() as connection:
            found = connection.execution_options(yield_per=_AT_ONCE).execute(statement)
            for row in found.mappings():
                yield {name: int(value) if name in (*_SUMS, "requests") else value for name, value in row.items()}
    except DATABASE_ERRORS as error:
        raise UnavailableError("database_unavailable", "The database of usage cannot be reached now.") from error


def write_csv(file: TextIO, found: Iterable[JSON]) -> int:
    """Writes rows with a header line; returns how many. Texts that a spreadsheet would compute get a quote before."""
    count, writer = 0, csv.writer(file)
    for row in found:
        if not count:
            writer.writerow(row)
        writer.writerow(
            f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value for value in row.values()
        )
        count += 1
    return count


def write_parquet(path: Path, found: Iterable[JSON]) -> int:
    """Writes rows as a Parquet file; returns how many.

    Raises:
        MissingDependencyError: without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MissingDependencyError("pyarrow", "Writing Parquet", "parquet") from None
    whole: list[JSON] = list(found)
    table = pyarrow.Table.from_pylist(whole)
    pyarrow.parquet.write_table(table, path)
    return len(whole)


def _sums(by: str) -> sqlalchemy.Select[Any]:
    sums = [sqlalchemy.func.sum(USAGE.c[name]).label(name) for name in _SUMS]
    failed = sqlalchemy.func.sum(sqlalchemy.case((USAGE.c.error_code != "", 1), else_=0))
    measured = [
        sqlalchemy.func.count().label("requests"),
        failed.label("failed"),
        *sums,
        sqlalchemy.func.avg(USAGE.c.first_token_s).label("mean_first_token_s"),
        sqlalchemy.func.avg(USAGE.c.total_s).label("mean_total_s"),
        sqlalchemy.func.sum(USAGE.c.dollars).label("dollars"),
    ]
    if by != "key":
        column = USAGE.c[by]
        return sqlalchemy.select(column, *measured).group_by(column).order_by(column)
    names = (USAGE.c.key_id, KEYS.c.name, KEYS.c.owner)
    joined = USAGE.outerjoin(KEYS, USAGE.c.key_id == KEYS.c.id)
    return sqlalchemy.select(*names, *measured).select_from(joined).group_by(*names).order_by(USAGE.c.key_id)


def _requests() -> sqlalchemy.Select[Any]:
    return sqlalchemy.select(USAGE).order_by(USAGE.c.finished, USAGE.c.request_id)


def _check_day(field: str, day: str) -> None:
    try:
        good = bool(re.fullmatch(r"\d{4}-\d\d-\d\d", day)) and bool(datetime.date.fromisoformat(day))
    except ValueError:
        good = False
    if not good:
        raise RequestError("invalid_parameter", f"{field} must be a day like 2026-11-25; got {day[:40]!r}.", field)
