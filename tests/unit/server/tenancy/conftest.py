"""A database as the server has it, once of each kind."""

import pytest
import sqlalchemy

from tokenmill.server.config import StoreConfig
from tokenmill.server.tenancy.store import KEYS, USAGE, Store


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    database = request.getfixturevalue("postgres_server").url if request.param == "postgresql" else ""
    store = Store(StoreConfig(state=str(tmp_path), database=database))
    store.migrate()
    with store.writing() as connection:
        connection.execute(sqlalchemy.delete(KEYS))
        connection.execute(sqlalchemy.delete(USAGE))
    yield store
    store.close()
