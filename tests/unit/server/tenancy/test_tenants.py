"""The parts behind keys and ledger, opened from options and closed in good order."""

from typing import Any

import pytest

from tokenmill.errors import ConfigError, UnavailableError
from tokenmill.server.config import AccessConfig, ServerConfig, StoreConfig, UsageConfig
from tokenmill.server.principal import ANYONE
from tokenmill.server.tenancy.keys import Keyring, Keys, KeySpec
from tokenmill.server.tenancy.ledger import Ledger, NoLedger
from tokenmill.server.tenancy.limits_memory import MemoryQuotas
from tokenmill.server.tenancy.limits_redis import RedisQuotas
from tokenmill.server.tenancy.store import Store
from tokenmill.server.tenancy.tenants import Tenants, tenants_opened

AWAY = "postgresql://user@127.0.0.1:9/x"


def test_by_default_everybody_is_served_and_nothing_written() -> None:
    tenants = Tenants()
    assert tenants.recognize("whatever") is ANYONE
    assert isinstance(tenants.ledger, NoLedger)


async def test_options_decide_what_is_opened(tmp_path: Any, redis_server: Any) -> None:
    folder = StoreConfig(state=str(tmp_path))
    async with tenants_opened(ServerConfig(store=folder, usage=UsageConfig(ledger=False))) as tenants:
        assert (tenants.keyring, type(tenants.ledger), type(tenants.quotas)) == (None, NoLedger, MemoryQuotas)
    assert list(tmp_path.iterdir()) == []
    access = AccessConfig(auth=True, redis=redis_server.url)
    async with tenants_opened(ServerConfig(store=folder, access=access)) as tenants:
        assert isinstance(tenants.keyring, Keyring)
        assert isinstance(tenants.ledger, Ledger)
        assert isinstance(tenants.quotas, RedisQuotas)
        assert tenants.recognize("whatever") is None
    assert not tenants.keyring._thread.is_alive()
    assert not tenants.ledger._thread.is_alive()
    assert (tmp_path / "tokenmill.db").exists()


@pytest.mark.parametrize("salted", [True, False])
async def test_whether_keys_have_caches_of_their_own_is_an_option(tmp_path: Any, salted: bool) -> None:
    folder = StoreConfig(state=str(tmp_path))
    store = Store(folder)
    store.migrate()
    key, secret = Keys(store).create(KeySpec(name="x"))
    config = ServerConfig(store=folder, access=AccessConfig(auth=True, salt_caches=salted))
    async with tenants_opened(config) as tenants:
        principal = tenants.recognize(secret)
        assert principal is not None
        assert principal.salt == (key.salt if salted else "")


async def test_without_its_database_a_server_with_keys_does_not_start() -> None:
    config = ServerConfig(store=StoreConfig(database=AWAY), access=AccessConfig(auth=True))
    with pytest.raises(UnavailableError) as caught:
        async with tenants_opened(config):
            pytest.fail("it started")
    assert caught.value.code == "database_unavailable"


async def test_without_its_database_a_server_with_nothing_but_a_ledger_starts_and_ends(tmp_path: Any) -> None:
    config = ServerConfig(store=StoreConfig(state=str(tmp_path), database=AWAY))
    async with tenants_opened(config) as tenants:
        assert tenants.ledger.lost == 0


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ServerConfig(store=StoreConfig(database="nonsense")), "database"),
        (ServerConfig(access=AccessConfig(redis="nonsense"), usage=UsageConfig(ledger=False)), "redis"),
    ],
)
async def test_an_address_that_is_none_is_told_at_the_start(config: ServerConfig, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with tenants_opened(config):
            pytest.fail("it started")
    assert caught.value.field == field
