"""What the contract says beyond the numbers."""

import dataclasses

import pytest
import torch

from tokenmill import kernels
from tokenmill.kernels.ops.paged_attention import cases

CASES = dict(cases())


@dataclasses.dataclass
class Arguments:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None

    def run(self):
        return kernels.paged_attention(*vars(self).values())


@pytest.mark.parametrize("name", ["mixed", "window", "bfloat16"])
def test_what_nobody_sees_does_not_count(name):
    arguments = Arguments(*CASES[name])
    before = arguments.run()
    unseen = arguments.k_cache.isnan()
    for cache in (arguments.k_cache, arguments.v_cache):
        cache[unseen] = 1e4
    assert unseen.any()
    assert torch.equal(arguments.run(), before)
    assert before.isfinite().all()


@pytest.mark.parametrize("entry", [-1, 10**6])
def test_table_entries_outside_the_window_may_be_any_number(entry):
    arguments = Arguments(*CASES["window"])
    before = arguments.run()
    queries = arguments.query_start.diff()
    for row, (context, count) in enumerate(zip(arguments.context_lens, queries, strict=True)):
        behind = (context - count - arguments.window + 1).clamp(min=0) // arguments.k_cache.shape[2]
        arguments.block_table[row, :behind] = entry
    assert (arguments.block_table == entry).any()
    assert torch.equal(arguments.run(), before)


def test_padding_queries_give_zeros():
    arguments = Arguments(*CASES["mixed"])
    real = arguments.query_start[-1]
    out = arguments.run()
    assert len(out) > real
    assert not out[real:].any()
    assert out[:real].any(dim=2).all()


@pytest.mark.parametrize("name", ["prefill", "softcap"])
def test_a_later_token_changes_nothing_before_it(name):
    arguments = Arguments(*CASES[name])
    before = arguments.run()
    row, context = 0, int(arguments.context_lens[0])
    block_size = arguments.k_cache.shape[2]
    block = arguments.block_table[row, (context - 1) // block_size]
    arguments.v_cache[block, :, (context - 1) % block_size] += 1
    after = arguments.run()
    last = int(arguments.query_start[1]) - 1
    assert torch.equal(after[:last], before[:last])
    assert not torch.equal(after[last], before[last])


def test_a_poisoned_row_leaves_the_others_alone():
    arguments = Arguments(*CASES["mixed"])
    before = arguments.run()
    arguments.v_cache[arguments.block_table[1, 0]] = float("nan")
    after = arguments.run()
    first, end = arguments.query_start[1], arguments.query_start[2]
    assert after[first:end].isnan().all()
    others = torch.ones(len(after), dtype=torch.bool)
    others[first:end] = False
    assert torch.equal(after[others], before[others])
