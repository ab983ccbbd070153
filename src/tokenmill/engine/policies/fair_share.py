"""Equal service for all tenants: the tenant with the least service so far goes first.

Virtual token counters (Sheng et al., arXiv 2401.00588): a prompt token counts 1, a generated token 2. A tenant that
comes back from idling starts at the lowest counter of those being served, so that idling earns no credit.
"""

from collections import Counter

from tokenmill.engine.config import SchedulerConfig
from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request

_GENERATED_WEIGHT = 2


class FairShare(Policy):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._served: Counter[str] = Counter()
        self._present: Counter[str] = Counter()

    def order(self, request: Request, view: View) -> tuple[int, float]:
        return (self._served[request.source.tenant], request.source.arrival)

    def arrived(self, request: Request) -> None:
        tenant = request.source.tenant
        others = [self._served[name] for name, count in self._present.items() if count and name != tenant]
        if not self._present[tenant] and others:
            self._served[tenant] = max(self._served[tenant], min(others))
        self._present[tenant] += 1

    def planned(self, request: Request, tokens: int) -> None:
        self._served[request.source.tenant] += _GENERATED_WEIGHT if request.decoding else tokens

    def left(self, request: Request) -> None:
        self._present[request.source.tenant] -= 1


POLICY = FairShare
