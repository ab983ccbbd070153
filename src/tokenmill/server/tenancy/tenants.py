"""Those who use the server: their keys, limits and ledger, opened and closed together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable

from tokenmill.server.config import ServerConfig
from tokenmill.server.principal import ANYONE, Principal
from tokenmill.server.tenancy.accounting import Accounting
from tokenmill.server.tenancy.costs import FREE, MachineTime, Prices
from tokenmill.server.tenancy.keys import Keyring, Keys
from tokenmill.server.tenancy.ledger import Ledger, NoLedger, Recorder
from tokenmill.server.tenancy.limits import RateLimits
from tokenmill.server.tenancy.limits_memory import MemoryQuotas
from tokenmill.server.tenancy.limits_redis import RedisQuotas
from tokenmill.server.tenancy.quota import Quotas
from tokenmill.server.tenancy.store import Store, state_folder

__all__ = ["Tenants", "tenants_opened"]


@dataclasses.dataclass(frozen=True)
class Tenants:
    """What the app needs to know whom it serves. The defaults serve everybody and write nothing down."""

    store: Store | None = None
    """Where keys and usage are."""
    keyring: Keyring | None = None
    """None while keys are off."""
    ledger: Recorder = dataclasses.field(default_factory=NoLedger)
    quotas: Quotas = dataclasses.field(default_factory=MemoryQuotas)
    prices: Prices = FREE

    @property
    def recognize(self) -> Callable[[str], Principal | None]:
        """Whose key a text is."""
        return self.keyring.recognize if self.keyring is not None else lambda _: ANYONE

    @property
    def current(self) -> Callable[[Principal], Principal | None]:
        """What somebody who was let in earlier may now."""
        return self.keyring.current if self.keyring is not None else lambda principal: principal

    def accounting(self, max_model_len: Callable[[], int]) -> Accounting:
        """The interceptor that limits and charges calls."""
        limits = RateLimits(self.quotas, self.prices, max_model_len)
        return Accounting(limits, self.ledger, self.prices, MachineTime())


@contextlib.asynccontextmanager
async def tenants_opened(config: ServerConfig) -> AsyncIterator[Tenants]:
    """Opens what the configuration asks for. At the end what is under way is delivered.

    Raises:
        ConfigError: ``invalid_option`` for an address that cannot be one.
        UnavailableError: ``database_unavailable`` when keys are on: without the database nobody is known. The ledger
            alone waits until the database is there.
    """
    access, usage = config.access, config.usage
    async with contextlib.AsyncExitStack() as stack:
        store = Store(config.store)
        stack.callback(store.close)
        keyring: Keyring | None = None
        if access.auth:
            keyring = Keyring(Keys(store), access.salt_caches)
            await asyncio.to_thread(store.migrate)
            await asyncio.to_thread(keyring.start)
            stack.callback(keyring.close)
        ledger: Recorder = NoLedger()
        if usage.ledger:
            ledger = Ledger(store, state_folder(config.store) / "usage-waiting.jsonl", usage.keep_usage_days)
            stack.push_async_callback(asyncio.to_thread, ledger.close)
        quotas: Quotas = MemoryQuotas()
        if access.redis:
            quotas = RedisQuotas(access.redis, quotas)
        stack.push_async_callback(quotas.close)
        prices = Prices(usage.dollars_per_hour, usage.dollars_per_million_input, usage.dollars_per_million_output)
        yield Tenants(store, keyring, ledger, quotas, prices)
