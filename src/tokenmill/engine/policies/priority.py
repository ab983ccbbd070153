"""Higher priority first; a request gains one level for every ten seconds it waits, so that none waits for ever."""

from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request

AGEING_S = 10.0


class Priority(Policy):
    def order(self, request: Request, view: View) -> tuple[float, float]:
        # Ageing moves all requests up at the same rate, so the order of two requests never changes with time and the
        # arrival can stand for the wait: priority + (now - arrival) / AGEING_S, without the common part.
        return (request.source.arrival / AGEING_S - request.source.priority, request.source.arrival)

    def victim(self, request: Request, view: View) -> tuple[float, float]:
        return (request.source.priority, request.computed / max(1, view.blocks_freed(request)))


POLICY = Priority
