"""First come, first served, with a token budget that follows latency goals.

A large budget finishes prompts sooner (time to first token) and makes each step longer for those that decode (time per
output token). After each step the budget is cut when the step took longer than `tpot_goal_ms`, and grown when first
tokens come later than `ttft_goal_ms` or, without that goal, whenever the step left room: additive increase,
multiplicative decrease.
"""

from tokenmill.engine.config import SchedulerConfig
from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request

_CUT = 0.7
_GROWTH_SHARE = 1 / 16  # of the limit, per step
_SMALLEST = 16


class Adaptive(Policy):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._limit = float(config.max_num_batched_tokens)
        self._budget = self._limit

    def order(self, request: Request, view: View) -> float:
        return request.source.arrival

    def token_budget(self, limit: int) -> int:
        return max(min(_SMALLEST, limit), min(limit, int(self._budget)))

    def stepped(self, seconds: float, tokens: int, first_waits: list[float]) -> None:
        goal, first_goal = self.config.tpot_goal_ms / 1e3, self.config.ttft_goal_ms / 1e3
        if goal and seconds > goal:
            self._budget = max(_SMALLEST, self._budget * _CUT)
        elif not first_goal or (first_waits and max(first_waits) > first_goal):
            self._budget = min(self._limit, self._budget + self._limit * _GROWTH_SHARE)


POLICY = Adaptive
