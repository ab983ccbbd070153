"""The database: its place, its migrations, and what happens when it cannot be used."""

import subprocess
import sys

import pytest
import sqlalchemy
from sqlalchemy import inspect

from tokenmill.errors import ConfigError, UnavailableError
from tokenmill.server.config import StoreConfig
from tokenmill.server.tenancy.store import KEYS, USAGE, Store

MIGRATE = """
import sys
from tokenmill.server.config import StoreConfig
from tokenmill.server.tenancy.store import Store
store = Store(StoreConfig(state=sys.argv[1], database=sys.argv[2]))
sys.stdin.read()
store.migrate()
"""


def _columns(store):
    with store.reading() as connection:
        seen = inspect(connection)
        return {name: {column["name"] for column in seen.get_columns(name)} for name in seen.get_table_names()}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_migrations_by_several_processes_at_once_make_the_tables_once(kind, tmp_path, request):
    database = request.getfixturevalue("postgres_server").url if kind == "postgresql" else ""
    command = [sys.executable, "-c", MIGRATE, str(tmp_path), database]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        process.stdin.close()  # all of them have come as far as this before one of them begins
    told = [process.stderr.read().decode() for process in processes]
    assert [process.wait() for process in processes] == [0] * 4, told
    store = Store(StoreConfig(state=str(tmp_path), database=database))
    assert store.dialect == kind
    assert _columns(store) == {
        "alembic_version": {"version_num"},
        "keys": set(KEYS.c.keys()),
        "usage": set(USAGE.c.keys()),
    }
    store.migrate()  # nothing is left to do
    store.close()


def test_the_migrations_make_the_tables_that_the_code_describes(tmp_path):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()
    described = sqlalchemy.create_engine("sqlite://")
    KEYS.metadata.create_all(described)
    made = {}
    with store.reading() as ours, described.connect() as theirs:
        for name, connection in (("migrated", ours), ("described", theirs)):
            made[name] = [
                (table, [(c["name"], str(c["type"]), c["nullable"]) for c in inspect(connection).get_columns(table)],
                 [(i["name"], i["column_names"]) for i in inspect(connection).get_indexes(table)])
                for table in ("keys", "usage")
            ]  # fmt: skip
    assert made["migrated"] == made["described"]


def test_the_file_is_for_its_owner_alone(tmp_path):
    store = Store(StoreConfig(state=str(tmp_path / "a %(b)s" / "..c")))
    store.migrate()
    file = tmp_path / "a %(b)s" / "..c" / "tokenmill.db"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("url", ["mysql://host/x", "sqlite:///x", "host:5432", "postgresql", "postgresql+psycopg2://h"])
def test_another_kind_of_database_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        Store(StoreConfig(database=url))
    assert (caught.value.code, caught.value.field) == ("invalid_option", "database")


def test_a_database_that_is_away_is_told_without_its_password():
    store = Store(StoreConfig(database="postgresql://user:secret@127.0.0.1:9/x"))
    with pytest.raises(UnavailableError) as caught:
        store.migrate()
    assert caught.value.code == "database_unavailable"
    assert "secret" not in caught.value.message


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="Not a directory"):
        Store(StoreConfig(state=str(tmp_path / "file" / "state"))).migrate()


def test_a_transaction_that_fails_leaves_nothing(tmp_path):
    store = Store(StoreConfig(state=str(tmp_path)))
    store.migrate()

    def begin_and_fail():
        with store.writing() as connection:
            connection.execute(sqlalchemy.text("INSERT INTO alembic_version VALUES ('x')"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin_and_fail()
    with store.reading() as connection:
        found = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).all()
    assert found == [("0001",)]
