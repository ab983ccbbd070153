"""What steps brought, on its way to the client: gathered, so that fast steps do not drown the process that serves HTTP.

Everything behind the engine costs per delivery, not per token: a message, a wake-up, a chunk of a stream, a write to a
socket, together some 80 microseconds of a processor. A small model makes thousands of tokens a second for dozens of
streams; handed over one by one they would take the processor from the engine. So the number of deliveries a second is
bounded, to a twentieth of the machine, and the tokens that fall into one travel together: with two cores and 64 streams
a stream gets its text 16 times a second. A report that is late by then leaves at once, so larger models, whose steps
take longer, and single streams see no difference.
"""

from __future__ import annotations

import msgspec

from tokenmill.engine.messages import Step
from tokenmill.types import Clock, EngineOutput, EngineStats

__all__ = ["Outbox"]

_DELIVERIES_PER_CORE_S = 500.0


class Outbox:
    """Gathers the outputs of steps into reports.

    Args:
        cores: of the machine, which engine and client share.
    """

    def __init__(self, clock: Clock, cores: int) -> None:
        self._clock = clock
        self._interval = 1 / (_DELIVERIES_PER_CORE_S * cores)
        self._outputs: list[EngineOutput] = []
        self._place: dict[str, int] = {}
        self._steps: list[tuple[int, float]] = []
        self._changed = False
        self._due = clock()

    def put(self, outputs: list[EngineOutput], step: tuple[int, float] | None = None) -> None:
        """Adds what a step or an abort brought.

        Args:
            step: tokens and seconds of the step, if there was one.
        """
        self._changed = True
        if step is not None:
            self._steps.append(step)
        for output in outputs:
            place = self._place.get(output.request_id)
            if place is None:
                self._place[output.request_id] = len(self._outputs)
                self._outputs.append(output)
            else:
                self._outputs[place] = _joined(self._outputs[place], output)
            if output.finish_reason is not None:
                del self._place[output.request_id]  # the id may come again

    def due(self, idle: bool) -> bool:
        """Whether a report should leave now.

        Args:
            idle: nothing is under way, so there is nothing more to wait for.
        """
        return self._changed and (idle or self._clock() >= self._due)

    def take(self, stats: EngineStats) -> Step:
        """The report of everything gathered.

        Args:
            stats: the engine's state now.
        """
        report = Step(self._outputs, stats, self._steps)
        self._outputs, self._place, self._steps, self._changed = [], {}, [], False
        self._due = self._clock() + len(report.outputs) * self._interval
        return report


def _joined(first: EngineOutput, then: EngineOutput) -> EngineOutput:
    """Two outputs of one request as one."""
    logprobs = then.logprobs if first.logprobs is None else first.logprobs + (then.logprobs or [])
    return msgspec.structs.replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        logprobs=logprobs,
        prompt_logprobs=then.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
    )
