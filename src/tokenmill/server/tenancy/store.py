"""The database of keys and usage: SQLite in the state folder, or PostgreSQL by URL.

Everything else speaks to it through `Store`. Its tables are made by the migrations in `migrations/` beside it.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import msgspec
import sqlalchemy
from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tokenmill.errors import ConfigError, MissingDependencyError, UnavailableError
from tokenmill.server.config import StoreConfig

__all__ = ["DATABASE_ERRORS", "KEYS", "USAGE", "Store", "state_folder", "told"]

DATABASE_ERRORS = (SQLAlchemyError, OSError)
"""What a database that is away, full or broken raises."""

_METADATA = MetaData()

KEYS = Table(
    "keys",
    _METADATA,
    Column("id", String(16), primary_key=True),
    Column("name", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("old_hash", String(64)),
    Column("old_until", Float),
    Column("scopes", Text, nullable=False),
    Column("models", Text),
    Column("priority", Integer, nullable=False),
    Column("limits", Text, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("version", BigInteger, nullable=False, unique=True),
)
"""One row per key. `version` grows with every change of any row, so that a reader can ask for what is new.

`hash` is the SHA-256 of the whole key, `old_hash` that of the one before the last rotation, good until `old_until`.
`scopes`, `models` and `limits` are JSON. Times are seconds since 1970.
"""

USAGE = Table(
    "usage",
    _METADATA,
    Column("request_id", String(128), primary_key=True),
    Column("finished", Float, nullable=False),
    Column("day", String(10), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("rejected_tokens", BigInteger, nullable=False),
    Column("queue_s", Float),
    Column("first_token_s", Float),
    Column("total_s", Float, nullable=False),
    Column("dollars", Float, nullable=False),
    Column("finish", Text, nullable=False),
    Column("error_code", Text, nullable=False),
    Index("usage_day", "day"),
)
"""One row per request that reached the engine. `day` is the UTC day of `finished`, as ``2026-11-25``."""

_WRITES = "tokenmill_writes"
_MIGRATION_LOCK = 0x746F6B656E  # any number, the same in every process
# The pool logs a traceback for each connection that ended with its server. What failed is told by whoever needed it.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)

_MIGRATING = threading.Lock()
"""Alembic has one context for the whole process."""
_TIMEOUT_S = 5


class Store:
    """A database with our tables in it. Safe to use from several threads.

    Args:
        config: where it is. Nothing is connected before the first use.

    Raises:
        ConfigError: ``invalid_option`` for a URL that is none of ours.
        MissingDependencyError: for PostgreSQL without its driver.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._file: Path | None = None
        self._current = False
        if config.database:
            self._engine = _postgresql(config.database)
        else:
            self._file = state_folder(config) / "tokenmill.db"
            self._engine = _sqlite(self._file)

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    def migrate(self) -> None:
        """Brings the tables to the form this version knows. Several processes may do so at once: one does the work.

        Raises:
            UnavailableError: ``database_unavailable``.
        """
        with _MIGRATING:
            if not self._current:
                self._migrate()
            self._current = True

    def _migrate(self) -> None:
        try:
            if self._file is not None:
                # The file holds hashes of keys and who used how much: it is nobody else's to read.
                self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file.touch(mode=0o600)
            config = alembic.config.Config()
            config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
            with self.writing() as connection:  # on SQLite this is the lock
                if self.dialect == "postgresql":
                    connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
        except DATABASE_ERRORS as error:
            raise UnavailableError("database_unavailable", f"The database cannot be used: {told(error)}.") from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlalchemy.Connection]:
        """A connection in a transaction that reads."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlalchemy.Connection]:
        """A connection in a transaction that writes; committed at the end, rolled back by an exception."""
        with self._engine.connect() as connection, connection.execution_options(**{_WRITES: True}).begin():
            yield connection

    def insert_new(self, connection: sqlalchemy.Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        """Inserts those rows whose primary key is not there yet."""
        if self.dialect == "sqlite":
            connection.execute(sqlite.insert(table).on_conflict_do_nothing(), rows)
            return
        # The driver would send one statement per row, each a round trip; this is one for all.
        name, whole = table.name, msgspec.json.encode(rows).decode()
        statement = f"INSERT INTO {name} SELECT * FROM json_populate_recordset(NULL::{name}, CAST(:rows AS json))"
        connection.execute(sqlalchemy.text(f"{statement} ON CONFLICT DO NOTHING"), {"rows": whole})

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        self._engine.dispose()


def state_folder(config: StoreConfig) -> Path:
    """The folder for what the server keeps: ``--state``, or ``~/.local/state/tokenmill``."""
    return Path(config.state).expanduser() if config.state else Path.home() / ".local" / "state" / "tokenmill"


def _sqlite(file: Path) -> sqlalchemy.Engine:
    url = sqlalchemy.URL.create("sqlite", database=str(file))
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": _TIMEOUT_S})

    # Python's driver begins transactions when it likes; ours begin when we say so.
    @sqlalchemy.event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")

    @sqlalchemy.event.listens_for(engine, "begin")
    def on_begin(connection: sqlalchemy.Connection) -> None:
        # A transaction that reads first and then writes can fail where waiting would have helped, so writers say it.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(address: str) -> sqlalchemy.Engine:
    try:
        url = sqlalchemy.make_url(address)
    except ArgumentError:
        url = None
    if url is None or url.drivername not in ("postgresql", "postgres"):
        raise ConfigError(
            "invalid_option", "database must be a URL like postgresql://user:password@host:5432/name.", "database"
        )
    try:
        return sqlalchemy.create_engine(
            url.set(drivername="postgresql+pg8000"), pool_pre_ping=True, connect_args={"timeout": _TIMEOUT_S}
        )
    except ModuleNotFoundError:
        raise MissingDependencyError("pg8000", "A PostgreSQL database", "postgres") from None


def told(error: Exception) -> str:
    """What the driver said, without SQLAlchemy's statement and values."""
    return str(getattr(error, "orig", None) or error).strip().rstrip(".")
