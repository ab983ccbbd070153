"""Everything that touches the device: turns a plan into tensors, runs the model, samples."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from tokenmill.engine.memory import ModelFacts
from tokenmill.engine.plan import PlannedRow, RowResult, StepPlan, StepResult
from tokenmill.engine.sampler import prompt_logprobs, sample_rows
from tokenmill.models.batch import ForwardBatch
from tokenmill.models.decoder import Decoder

__all__ = ["Runner"]


class Runner:
    """A model with its KV memory.

    Args:
        decoder: the loaded model.
        facts: layout and size of the KV memory to allocate.
    """

    def __init__(self, decoder: Decoder, facts: ModelFacts) -> None:
        self._decoder = decoder
        self._layout = facts.layout
        self._cache = decoder.new_cache(facts.layout, facts.num_blocks)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Computes one step. Writes KV memory; keeps no other state."""
        self._cache.copy_blocks(plan.copies)
        hidden = self._decoder.forward(self._batch(plan), self._cache)
        ends = list(accumulate(len(row.tokens) for row in plan.rows))
        chosen = [index for index, row in enumerate(plan.rows) if row.sample]
        results = [RowResult()] * len(plan.rows)
        if chosen:
            logits = self._decoder.logits(hidden[[ends[index] - 1 for index in chosen]])
            sampled = sample_rows(logits, [row.sample for row in plan.rows if row.sample])
            for index, token, logprobs in zip(chosen, sampled.token_ids, sampled.logprobs, strict=True):
                results[index] = RowResult((token,), () if logprobs is None else (logprobs,))
        for index, row in enumerate(plan.rows):
            if row.scored:
                first = ends[index] - len(row.tokens)
                logits = self._decoder.logits(hidden[first : first + len(row.scored)])
                scores = tuple(prompt_logprobs(logits, row.scored, row.scores))
                results[index] = RowResult(results[index].tokens, results[index].logprobs, scores)
        return StepResult(plan.step, tuple(results))

    def _batch(self, plan: StepPlan) -> ForwardBatch:
        rows, padding = plan.rows, plan.padding
        token_ids = [token for row in rows for token in row.tokens] + [0] * padding
        positions = np.concatenate([np.arange(row.start, row.start + len(row.tokens)) for row in rows])
        groups = range(len(self._layout.groups))
        tables = [self._tables(rows, group) for group in groups]
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(row.tokens) for row in rows], out=query_start[1:])
        row_of = np.repeat(np.arange(len(rows)), np.diff(query_start))
        size = self._layout.block_size
        slots = [
            np.pad(table[row_of, positions // size] * size + positions % size, (0, padding), constant_values=-1)
            for table in tables
        ]
        return ForwardBatch(
            token_ids=self._tensor(np.array(token_ids, np.int64)),
            positions=self._tensor(np.pad(positions, (0, padding))),
            slots=tuple(map(self._tensor, slots)),
            block_tables=tuple(self._tensor(table.astype(np.int32)) for table in tables),
            query_start=self._tensor(query_start),
            context_lens=self._tensor(np.array([row.start + len(row.tokens) for row in rows], np.int32)),
        )

    def _tables(self, rows: tuple[PlannedRow, ...], group: int) -> np.ndarray:
        """Block tables of one group, int64 [rows, longest]; shorter ones end in null blocks."""
        tables = np.zeros((len(rows), max(len(row.tables[group]) for row in rows)), np.int64)
        for index, row in enumerate(rows):
            tables[index, : len(row.tables[group])] = row.tables[group]
        return tables

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._decoder.device)
