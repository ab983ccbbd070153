"""The engine: plan, execute, commit.

step():  plan    = scheduler.plan()          which tokens of which requests, in which blocks
         result  = executor.execute(plan)    the only call that touches the device
         outputs = scheduler.commit(...)     counters, finish reasons, events
"""

from __future__ import annotations

import heapq
import logging
import random
import time
from collections.abc import Iterable
from typing import cast

from tokenmill.engine.config import BATCHING, POLICIES, EngineConfig
from tokenmill.engine.events import EventLog
from tokenmill.engine.executor import Executor
from tokenmill.engine.kv.manager import KVManager
from tokenmill.engine.policy import Batching, Policy
from tokenmill.engine.request import Request
from tokenmill.engine.scheduler import Scheduler
from tokenmill.errors import RequestError, TokenmillError
from tokenmill.types import Clock, EngineOutput, EngineRequest, EngineStats, ErrorInfo, FinishReason

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests of token ids. Single-threaded: whoever owns it calls `add`, `abort` and `step` in turn.

    Args:
        executor: where plans are computed.
        clock: seconds that never go backwards; the only time the engine knows.
    """

    def __init__(self, config: EngineConfig, executor: Executor, clock: Clock = time.monotonic) -> None:
        self.config = config
        self.facts = facts = executor.facts
        self.events = EventLog(config.events)
        self._executor = executor
        self._clock = clock
        self._random = random.Random(config.seed)
        self.kv = KVManager(
            facts.layout,
            facts.num_blocks,
            config.scheduler.max_num_batched_tokens,
            clock,
            self.events,
            prefix_caching=config.cache.prefix_caching,
            eviction=config.cache.eviction,
            ttl_s=config.cache.prefix_ttl_s,
        )
        policy = cast(type[Policy], POLICIES.get(config.scheduler.policy))
        batching = cast(type[Batching], BATCHING.get(config.scheduler.batching))
        self.scheduler = Scheduler(
            config.scheduler,
            self.kv,
            policy(config.scheduler),
            batching(config.scheduler),
            facts.eos_ids,
            clock,
            self.events,
        )
        self._last_progress = clock()
        self.last_step = (0, 0.0)
        """Tokens and seconds of the latest step."""
        self._deadlines: list[tuple[float, str]] = []
        """A heap; those of requests that have ended stay until their time comes."""

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.requests)

    def add(self, request: EngineRequest) -> None:
        """Takes a request, or refuses it before anything is allocated.

        Raises:
            RequestError: ``duplicate_request_id``, ``empty_prompt``, ``invalid_token``, ``prompt_too_long``,
                ``unknown_adapter`` or ``invalid_parameter``.
        """
        try:
            limit = self._check(request)
        except RequestError as error:
            self.events.add(self._clock(), request.request_id, "refuse", error.code, len(request.prompt_token_ids))
            raise
        if not self.has_work:
            self._last_progress = self._clock()
        seed = request.params.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        prepared = self._executor.prepare(request.params)
        self.scheduler.add(Request(request, limit, seed, self.kv.block_size, self._clock(), prepared))
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def _check(self, request: EngineRequest) -> int:
        """The most tokens the request may generate."""
        prompt, params, longest = request.prompt_token_ids, request.params, self.facts.max_model_len
        vocab = self.facts.vocab_size
        if request.request_id in self.scheduler.requests:
            raise RequestError(
                "duplicate_request_id", f"A request {request.request_id!r} is under way; use another id.", "request_id"
            )
        if not prompt:
            raise RequestError("empty_prompt", "The prompt has no tokens; send at least one.", "prompt")
        room = longest - len(prompt)
        answer = 0 if request.pooling else 1
        if room < answer:
            left = ", with one left for the answer" if answer else ""
            raise RequestError(
                "prompt_too_long",
                f"The prompt has {len(prompt)} tokens; at most {longest - answer} fit{left}. "
                "Shorten it, or serve with a larger max_model_len.",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise RequestError("invalid_token", f"Token ids must be between 0 and {vocab - 1}.", "prompt")
        if request.adapter:
            raise RequestError("unknown_adapter", f"There is no adapter {request.adapter!r}.", "adapter")
        named = {
            "logit_bias": params.logit_bias or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "stop_token_ids": params.stop_token_ids,
            "bad_words_ids": [token for word in params.bad_words_ids for token in word],
        }
        for field, ids in named.items():
            if any(not 0 <= token < vocab for token in ids):
                raise RequestError("invalid_parameter", f"{field} has token ids outside 0..{vocab - 1}.", field)
        if request.pooling is not None:
            if (request.pooling.dimensions or 1) > self.facts.hidden_size:
                message = f"dimensions must be between 1 and {self.facts.hidden_size} for this model."
                raise RequestError("invalid_parameter", message, "dimensions")
            return 0
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def abort(self, request_ids: Iterable[str]) -> list[EngineOutput]:
        """Ends requests at once and frees everything they held. Unknown ids, for example of ended ones, are ignored."""
        requests = [self.scheduler.requests.get(request_id) for request_id in request_ids]
        return [self.scheduler.finish(request, FinishReason.ABORT) for request in requests if request is not None]

    def step(self) -> list[EngineOutput]:
        """Computes one step, if anything can run, and returns what it brought.

        A step that fails ends the requests in it with the reason; the engine goes on with the others. Requests whose
        deadline has passed end before it, with ``deadline_exceeded``.
        """
        late = self._expire()
        plan = self.scheduler.plan()
        if plan is None:
            return late
        began = self._clock()
        try:
            result = self._executor.execute(plan)
        except Exception as error:
            logger.exception("step %d failed", plan.step)
            code = error.code if isinstance(error, TokenmillError) else "step_failed"
            outputs = self.scheduler.fail(plan, ErrorInfo(code, f"The step that computed this request failed: {error}"))
        else:
            outputs = self.scheduler.commit(plan, result, self._clock() - began)
        self._last_progress = self._clock()
        self.last_step = (plan.tokens, self._last_progress - began)
        self.events.step += 1
        return late + outputs

    def _expire(self) -> list[EngineOutput]:
        """Ends the requests whose deadline has passed, waiting or running: nobody wants their answer any more."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self.scheduler.requests.get(request_id)
            if request is not None and request.source.deadline == deadline:  # its id may be another's by now
                seconds = deadline - request.source.arrival
                message = f"The answer was not complete within the {seconds:.3g} s that the request allowed."
                error = ErrorInfo("deadline_exceeded", message, "timeout_s")
                outputs.append(self.scheduler.finish(request, FinishReason.ERROR, error=error))
        return outputs

    def stats(self) -> EngineStats:
        """State now."""
        scheduler, pool = self.scheduler, self.kv.pool
        counters = scheduler.counters
        return EngineStats(
            steps=self.events.step,
            last_progress=self._last_progress,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_by_reason=scheduler.waiting_by_reason(),
            blocks_total=pool.usable,
            blocks_used=pool.usable - pool.available,
            blocks_cached=pool.cached,
            block_size=self.kv.block_size,
            max_model_len=self.facts.max_model_len,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            misses=dict(counters.misses),
            recomputed_tokens=counters.recomputed_tokens,
            padded_tokens=counters.padded_tokens,
            preemptions=counters.preemptions,
            finished=dict(counters.finished),
            step_tokens=self.last_step[0],
            step_seconds=self.last_step[1],
        )

    def pin(
        self, name: str, token_ids: list[int], *, salt: str = "", adapter: str = "", ttl_s: float | None = None
    ) -> int:
        """Keeps the cached part of a prefix from eviction; returns the pinned tokens. See `KVManager.pin`."""
        keep = self.facts.max_model_len
        return self.kv.pin(name, token_ids, keep, salt=salt, adapter=adapter, ttl_s=ttl_s)

    def unpin(self, name: str) -> bool:
        """Ends a pin; returns whether there was one."""
        return self.kv.unpin(name)
