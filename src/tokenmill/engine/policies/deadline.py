"""Earliest deadline first; requests without one come after those with one, in order of arrival."""

import math

from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request


class Deadline(Policy):
    def order(self, request: Request, view: View) -> tuple[float, float]:
        deadline = request.source.deadline
        return (math.inf if deadline is None else deadline, request.source.arrival)

    def victim(self, request: Request, view: View) -> tuple[float, float]:
        deadline = request.source.deadline
        slack = math.inf if deadline is None else deadline - view.now
        return (-slack, request.computed / max(1, view.blocks_freed(request)))


POLICY = Deadline
