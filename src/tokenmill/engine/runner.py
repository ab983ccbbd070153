"""Everything that touches the device: turns a plan into tensors, runs the model, samples."""

from __future__ import annotations

from array import array
from itertools import accumulate

import msgspec
import torch
from torch import Tensor

from tokenmill.engine.grammar import Grammars, Masks
from tokenmill.engine.kv.pool import NULL_BLOCK
from tokenmill.engine.memory import ModelFacts
from tokenmill.engine.plan import RowResult, StepPlan, StepResult
from tokenmill.engine.pooler import pool
from tokenmill.engine.sampler import column_tensor, prompt_logprobs, sample_rows
from tokenmill.models.batch import ForwardBatch
from tokenmill.models.decoder import Decoder
from tokenmill.types import FinishReason

__all__ = ["Runner"]


class Runner:
    """A model with its KV memory.

    Args:
        decoder: the loaded model.
        facts: layout and size of the KV memory to allocate.
        grammars: those that answers must follow.
    """

    def __init__(self, decoder: Decoder, facts: ModelFacts, grammars: Grammars) -> None:
        self._decoder = decoder
        self._layout = facts.layout
        self._cache = decoder.new_cache(facts.layout, facts.num_blocks)
        self._masks = Masks(grammars, facts)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Computes one step. Writes KV memory; keeps no other state that does not follow from the plans."""
        wanted = [row.sample for row in plan.rows if row.sample and row.sample.params.structured]
        pending = self._masks.begin(wanted)
        if plan.copies:
            self._cache.copy_blocks(plan.copies)
        hidden = self._decoder.forward(self._batch(plan), self._cache)
        ends = list(accumulate(len(row.tokens) for row in plan.rows))
        chosen = [index for index, row in enumerate(plan.rows) if row.sample]
        results = [RowResult()] * len(plan.rows)
        if chosen:
            last = hidden
            if len(chosen) < len(hidden):
                last = hidden.index_select(0, self._tensor(array("q", [ends[index] - 1 for index in chosen])))
            logits = self._decoder.logits(last)
            masks = {name: mask for share in pending for name, mask in share.result().items()}
            sampled = sample_rows(logits, [row.sample for row in plan.rows if row.sample], masks)
            for index, token, logprobs in zip(chosen, sampled.token_ids, sampled.logprobs, strict=True):
                results[index] = RowResult((token,), () if logprobs is None else (logprobs,))
            for index in (chosen[place] for place in sampled.stuck):
                results[index] = masks[plan.rows[index].request_id].ending()
        for index, row in enumerate(plan.rows):
            if row.scored:
                first = ends[index] - len(row.tokens)
                logits = self._decoder.logits(hidden[first : first + len(row.scored)])
                scores = tuple(prompt_logprobs(logits, row.scored, row.scores))
                results[index] = msgspec.structs.replace(results[index], scores=scores)
            if row.pool is not None:
                pooled = pool(hidden[ends[index] - len(row.tokens) : ends[index]], row.pool)
                results[index] = RowResult(pooled=pooled, ended=FinishReason.STOP if row.pool.last else None)
        return StepResult(plan.step, tuple(results))

    def _batch(self, plan: StepPlan) -> ForwardBatch:
        # Arrays of Python's own: to fill them for the few tokens of a common step takes less than one call of numpy.
        size = self._layout.block_size
        token_ids, positions = array("q"), array("q")
        query_start, context_lens = array("i", [0]), array("i")
        slots = [array("q") for _ in self._layout.groups]
        for row in plan.rows:
            own = range(row.start, row.start + len(row.tokens))
            token_ids.extend(row.tokens)
            positions.extend(own)
            query_start.append(len(positions))
            context_lens.append(own.stop)
            for of_group, table in zip(slots, row.tables, strict=True):
                of_group.extend([table[position // size] * size + position % size for position in own])
        for column, value in ((token_ids, 0), (positions, 0), *((of_group, -1) for of_group in slots)):
            column.extend([value] * plan.padding)
        tables = [self._table([row.tables[group] for row in plan.rows]) for group in range(len(slots))]
        return ForwardBatch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=tuple(map(self._tensor, slots)),
            block_tables=tuple(tables),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(context_lens),
        )

    def _table(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Block tables of one group, [rows, longest] int32; shorter ones end in null blocks."""
        longest = max(map(len, rows))
        table = array("i")
        for row in rows:
            table.extend(row)
            table.extend([NULL_BLOCK] * (longest - len(row)))
        return self._tensor(table).view(len(rows), longest)

    def _tensor(self, column: array[int]) -> Tensor:
        return column_tensor(column, self._decoder.device)
