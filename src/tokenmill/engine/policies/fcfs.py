"""First come, first served."""

from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request


class FirstComeFirstServed(Policy):
    def order(self, request: Request, view: View) -> float:
        return request.source.arrival


POLICY = FirstComeFirstServed
