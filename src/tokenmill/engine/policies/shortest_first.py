"""The request that will end soonest first: what is left of its prompt plus the output predicted for it.

The prediction is a running mean of the tenant's own outputs, bounded by what the request may generate. Shortest
remaining work first gives the lowest mean latency when the prediction is right (SRPT, Schrage 1968).
"""

from tokenmill.engine.config import SchedulerConfig
from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request

_WEIGHT = 0.1
_OUTPUT_COST = 8.0  # a decoded token occupies a step; a prompt token shares it with many others


class ShortestFirst(Policy):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._mean_output: dict[str, float] = {}

    def order(self, request: Request, view: View) -> float:
        predicted = min(request.limit, self._mean_output.get(request.source.tenant, request.limit))
        return request.pending + _OUTPUT_COST * max(1.0, predicted - request.generated)

    def left(self, request: Request) -> None:
        tenant = request.source.tenant
        mean = self._mean_output.get(tenant, float(request.generated))
        self._mean_output[tenant] = mean + _WEIGHT * (request.generated - mean)


POLICY = ShortestFirst
