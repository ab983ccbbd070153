"""Tenants in turn: the one admitted longest ago is next, and within a tenant the first to come."""

from tokenmill.engine.config import SchedulerConfig
from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request


class RoundRobin(Policy):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._turn = 0
        self._last: dict[str, int] = {}

    def order(self, request: Request, view: View) -> tuple[int, float]:
        return (self._last.get(request.source.tenant, 0), request.source.arrival)

    def admitted(self, request: Request) -> None:
        self._turn += 1
        self._last[request.source.tenant] = self._turn


POLICY = RoundRobin
