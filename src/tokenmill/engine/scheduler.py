"""What runs in the next step. The mechanism; the choices are in `policies` and `batching`.

`plan` is asked before a step and `commit` (or `fail`) told after it. In between no state changes. One token budget
per step: first the next token of every request that decodes, then chunks of prompts under way, then new requests
while blocks allow.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import msgspec

from tokenmill.engine.config import SchedulerConfig
from tokenmill.engine.events import EventLog
from tokenmill.engine.kv.manager import KVManager
from tokenmill.engine.plan import PlannedRow, RowResult, SampleRow, StepPlan, StepResult
from tokenmill.engine.policy import Batching, Policy
from tokenmill.engine.request import Request
from tokenmill.types import Clock, EngineOutput, ErrorInfo, FinishReason

__all__ = ["Counters", "Scheduler"]


@dataclasses.dataclass
class Counters:
    """Totals since the start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    recomputed_tokens: int = 0
    padded_tokens: int = 0
    preemptions: int = 0
    misses: Counter[str] = dataclasses.field(default_factory=Counter)
    finished: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass
class _Draft:
    """A plan while it is made."""

    budget: int
    rows: list[PlannedRow] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Scheduler:
    """Owns all requests between their arrival and their end.

    Args:
        eos_ids: end-of-text tokens of the model.
        clock: any clock; the scheduler never reads another.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        policy: Policy,
        batching: Batching,
        eos_ids: Iterable[int],
        clock: Clock,
        events: EventLog,
    ) -> None:
        self.config = config
        self.kv = kv
        self.policy = policy
        self.batching = batching
        self.clock = clock
        self.events = events
        self.eos_ids = frozenset(eos_ids)
        self.counters = Counters()
        self.requests: dict[str, Request] = {}
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.now = clock()

    # ---- what a policy may look at (policy.View) ------------------------------------------------------------------

    def cached_tokens(self, request: Request) -> int:
        if request.hint is None or request.hint[0] != self.kv.version:
            request.hint = (self.kv.version, self.kv.lookup(request).tokens)
        return request.hint[1]

    def blocks_freed(self, request: Request) -> int:
        return self.kv.freed_by(request)

    # ---- arrival and end ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts a checked request into the queue."""
        self.requests[request.id] = self.waiting[request.id] = request
        self.policy.arrived(request)
        self.events.add(self.clock(), request.id, "arrive", tokens=request.prompt_len)

    def finish(
        self, request: Request, reason: FinishReason, stop_token: int | None = None, error: ErrorInfo | None = None
    ) -> EngineOutput:
        """Ends a request and frees everything it held at once. The returned output has no tokens."""
        now = self.clock()
        self.kv.release(request)
        del self.requests[request.id]
        self.waiting.pop(request.id, None)
        self.running.pop(request.id, None)
        self.policy.left(request)
        self.counters.finished[reason] += 1
        self.events.add(now, request.id, "finish", error.code if error else reason, request.generated)
        return EngineOutput(
            request_id=request.id,
            cached_tokens=request.cached_tokens,
            finish_reason=reason,
            stop_token=stop_token,
            error=error,
            stats=request.stats(now),
        )

    # ---- plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can run now. Takes blocks; changes no counters of progress."""
        self.now = self.clock()
        self.kv.expire_pins()
        draft = _Draft(budget=self.policy.token_budget(self.config.max_num_batched_tokens))
        self._continue_running(draft)
        if self.waiting:
            oldest = self.now - min(request.queued_since for request in self.waiting.values())
            if self.batching.admits(len(self.running), len(self.waiting), oldest):
                self._admit(draft)
        if not draft.rows:
            return None
        padding = self.batching.padding(len(self.running))
        self.counters.padded_tokens += padding
        return StepPlan(self.events.step, tuple(draft.rows), tuple(draft.copies), padding)

    def _key(self, request: Request) -> tuple[bool, object]:
        """The policy's order, behind those that have waited so long that it no longer counts."""
        starving = self.now - request.source.arrival > self.config.starvation_s
        return (False, request.source.arrival) if starving else (True, self.policy.order(request, self))

    def _continue_running(self, draft: _Draft) -> None:
        # The first in order is never preempted: it ends, and so does whoever is first after it.
        order = sorted(self.running.values(), key=lambda request: (not request.decoding, self._key(request)))
        while order and draft.budget > 0:
            request = order.pop(0)
            count = min(request.pending, draft.budget)
            while not self.kv.can_grow(request, count):
                candidates = order if not draft.rows else [request, *order]
                victim = min(candidates, key=lambda candidate: self.policy.victim(candidate, self))
                self.preempt(victim, request.id)
                if victim is request:
                    break
                order.remove(victim)
            else:
                self._place(request, count, draft)

    def preempt(self, victim: Request, on_behalf_of: str) -> None:
        """Takes all blocks back from a running request, which waits again with everything it has generated."""
        blocks = self.kv.freed_by(victim)
        self.events.add(self.now, victim.id, "preempt", on_behalf_of, victim.computed, blocks)
        self.kv.release(victim)
        victim.preemptions += 1
        victim.queued_since = self.now
        victim.deferred = "preempted"
        self.counters.preemptions += 1
        del self.running[victim.id]
        self.waiting[victim.id] = victim

    def _admit(self, draft: _Draft) -> None:
        passed: set[str] = set()
        while len(self.running) < self.config.max_num_seqs and len(passed) < len(self.waiting):
            request = min((r for r in self.waiting.values() if r.id not in passed), key=self._key)
            if draft.budget <= 0 and not self.batching.beyond_budget:
                return self._defer(request, "token_budget")
            if not request.prepared.done():
                self._defer(request, "grammar")
                passed.add(request.id)
                continue
            parent = self.requests.get(request.source.parent)
            if parent is not None and parent.computed < request.prompt_len and not request.preemptions:
                # Completions of one prompt wait for the first of them and then share its blocks.
                self._defer(request, "parent")
                passed.add(request.id)
                continue
            if not self._take_blocks(request, parent):
                return self._defer(request, "kv_blocks")
            del self.waiting[request.id]
            self.running[request.id] = request
            self.policy.admitted(request)
            self.batching.joined(request)
            if draft.budget > 0:
                self._place(request, min(request.pending, draft.budget), draft)
        if self.waiting and len(self.running) >= self.config.max_num_seqs:
            self._defer(min(self.waiting.values(), key=self._key), "max_num_seqs")
        return None

    def _take_blocks(self, request: Request, parent: Request | None) -> bool:
        """Admits a request to KV memory, by fork or by prefix hit. False, and no change, when blocks are short."""
        if parent is not None and not request.generated and self.kv.can_fork(parent, request):
            self.kv.fork(parent, request)
            self.events.add(self.now, request.id, "fork", parent.id, request.computed)
        else:
            hit = self.kv.lookup(request)
            # Leave each running request a block to grow into, or it would be preempted at once.
            if not self.kv.can_admit(request, hit, reserve=len(self.running)):
                return False
            if request.scheduled is None:
                self._record_misses(request, self.kv.explain_misses(request, hit))
            self.kv.admit(request, hit)
        self._count_admission(request)
        return True

    def _record_misses(self, request: Request, misses: dict[str, int]) -> None:
        request.misses = misses
        self.counters.misses.update(misses)
        for reason, tokens in misses.items():
            self.events.add(self.now, request.id, "miss", reason, tokens)

    def _count_admission(self, request: Request) -> None:
        """Counts each prompt once: what is found again after a preemption is no hit, only less to recompute."""
        if request.scheduled is not None:
            request.recomputed += request.pending
            self.counters.recomputed_tokens += request.pending
            self.events.add(self.now, request.id, "resume", tokens=request.pending)
            return
        request.scheduled = self.now
        request.cached_tokens = request.computed
        if not request.misses:  # a fork looks nothing up: only the last token is computed again
            request.misses = {"last_token": request.pending}
            self.counters.misses.update(request.misses)
        self.counters.prompt_tokens += request.prompt_len
        self.counters.prefix_queries += request.prompt_len
        self.counters.prefix_hits += request.computed
        blocks = sum(map(len, request.tables))
        if request.computed:
            self.events.add(self.now, request.id, "hit", tokens=request.computed, blocks=blocks)
        self.events.add(self.now, request.id, "admit", tokens=request.pending, blocks=blocks)

    def _defer(self, request: Request, reason: str) -> None:
        if request.deferred != reason:
            request.deferred = reason
            self.events.add(self.now, request.id, "defer", reason, request.pending)

    def _place(self, request: Request, count: int, draft: _Draft) -> None:
        """Puts the next `count` tokens of a running request into the plan."""
        copies = self.kv.grow(request, count)
        for _ in copies:
            self.events.add(self.now, request.id, "copy", blocks=1)
        draft.copies += copies
        draft.budget -= count
        draft.rows.append(self._row(request, count))
        self.policy.planned(request, count)
        if not request.decoding:
            self.events.add(self.now, request.id, "chunk", tokens=count)

    def _row(self, request: Request, count: int) -> PlannedRow:
        start, end = request.computed, request.computed + count
        sample, pool = None, request.pool_row(end)
        if end == len(request.tokens) and pool is None:
            stops = request.params.stop_token_ids
            stop_ids = tuple(stops) if request.params.ignore_eos else (*self.eos_ids, *stops)
            sample = SampleRow(
                request.id, request.params, request.seed, end, request.generated, request.tokens,
                request.prompt_len, stop_ids,
            )  # fmt: skip
        scored: tuple[int, ...] = ()
        scores = request.params.prompt_logprobs
        if scores is not None and request.generated == 0:
            scored = tuple(request.tokens[start + 1 : end + 1])
        tables = tuple(map(tuple, request.tables))
        tokens = tuple(request.tokens[start:end])
        return PlannedRow(request.id, start, tokens, tables, sample, scored, scores or 0, pool)

    # ---- after the step -------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, seconds: float) -> list[EngineOutput]:
        """Moves the counters of every row of a computed plan, and ends the requests that are done.

        Args:
            seconds: how long the step took.
        """
        self.now = self.clock()
        outputs: list[EngineOutput] = []
        first_waits: list[float] = []
        for row, came in zip(plan.rows, result.rows, strict=True):
            request = self.requests.get(row.request_id)
            if request is None:
                continue
            request.computed = row.start + len(row.tokens)
            request.prompt_logprobs += came.scores
            request.pooled = came.pooled
            self.kv.commit(request)
            if came.tokens:
                if request.first_token is None:
                    request.first_token = self.now
                    first_waits.append(self.now - request.source.arrival)
                outputs.append(self._append(request, came))
            elif came.ended is not None:
                ended = self.finish(request, came.ended, error=came.error)
                outputs.append(msgspec.structs.replace(ended, embedding=came.pooled))
        self.policy.stepped(seconds, plan.tokens, first_waits)
        return outputs

    def _append(self, request: Request, came: RowResult) -> EngineOutput:
        """Adds the chosen tokens to the request, up to the one that ends it."""
        reason = None
        taken = 0
        first = request.generated == 0
        for token in came.tokens:
            request.tokens.append(token)
            taken += 1
            reason = request.finish_reason(token, self.eos_ids)
            if reason is not None:
                break
        self.counters.generation_tokens += taken
        ended = None
        if reason is not None:
            last = request.tokens[-1]
            stop = last if reason is FinishReason.STOP and last in request.params.stop_token_ids else None
            ended = self.finish(request, reason, stop)
        wants_scores = first and request.params.prompt_logprobs is not None
        return EngineOutput(
            request_id=request.id,
            token_ids=list(came.tokens[:taken]),
            logprobs=list(came.logprobs[:taken]) or None,
            prompt_logprobs=request.prompt_logprobs if wants_scores else None,
            cached_tokens=request.cached_tokens,
            finish_reason=reason,
            stop_token=ended.stop_token if ended else None,
            stats=ended.stats if ended else None,
        )

    def fail(self, plan: StepPlan, error: ErrorInfo) -> list[EngineOutput]:
        """Ends every request of a plan that could not be computed. The others go on."""
        requests = [self.requests.get(row.request_id) for row in plan.rows]
        return [self.finish(request, FinishReason.ERROR, error=error) for request in requests if request is not None]

    def waiting_by_reason(self) -> dict[str, int]:
        """Waiting requests by the last reason that kept one of them waiting; those behind it count as ``queue``."""
        return dict(Counter(request.deferred or "queue" for request in self.waiting.values()))
