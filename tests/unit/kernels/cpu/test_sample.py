"""Native sampling takes the token that the reference takes, and native penalties leave its bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.kernels.ops import penalize as penalize_op
from tokenmill.kernels.ops import sample as sample_op
from tokenmill.kernels.ops import token_logprobs as logprobs_op

_native = pytest.importorskip("tokenmill.kernels.cpu._native")
from tokenmill.kernels.cpu.penalize import penalize  # noqa: E402
from tokenmill.kernels.cpu.sample import sample  # noqa: E402
from tokenmill.kernels.cpu.token_logprobs import token_logprobs  # noqa: E402


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.thread_count()
    _native.set_thread_count(2)
    yield
    _native.set_thread_count(before)


def settings(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, ...]:
    return (
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
    )


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in sample_op.cases()])
def test_the_cases_of_the_operation(arguments: tuple[Any, ...]) -> None:
    logits, *rest, _ = arguments
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(logits), generator=random, dtype=torch.float64)
        assert torch.equal(sample(logits, *rest, uniform), sample_op.reference(logits, *rest, uniform))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"top_k": 1},
        {"top_k": 50, "min_p": 0.02},
        {"top_k": 300},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.05, "temperature": 1.5},
        {"top_k": 1000, "top_p": 0.3, "min_p": 0.001},
    ],
)
@pytest.mark.parametrize(("rows", "vocabulary"), [(40, 20_011), (6, 151_936)])
def test_large_vocabularies(changes: dict[str, Any], rows: int, vocabulary: int) -> None:
    random = torch.Generator().manual_seed(7)
    logits = torch.randn(rows, vocabulary, generator=random) * 3
    uniform = torch.rand(rows, generator=random, dtype=torch.float64)
    given = settings(rows, **changes)
    expected = sample_op.reference(logits, *given, uniform)
    # A uniform within rounding of the border between two tokens may give the other one.
    assert (sample(logits, *given, uniform) != expected).sum() <= 1


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.7}, {"top_k": 9}, {"min_p": 0.3}, {"temperature": 0.0}])
def test_equal_logits_go_by_id(changes: dict[str, Any]) -> None:
    logits = torch.zeros(64, 1000)
    logits[:, ::3] = 1.0
    uniform = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    given = settings(64, **changes)
    assert torch.equal(sample(logits, *given, uniform), sample_op.reference(logits, *given, uniform))


@pytest.mark.parametrize("changes", [{}, {"top_k": 7}, {"top_p": 0.9}, {"temperature": 1e-30}, {"temperature": 1e30}])
def test_the_ends_of_the_uniform_stay_within_what_is_possible(changes: dict[str, Any]) -> None:
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(1))
    logits[:, 2900:] = float("-inf")
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens = sample(logits, *settings(2, **changes), uniform)
    assert (tokens < 2900).all()
    assert (tokens >= 0).all()


def test_what_is_not_a_number_is_never_taken() -> None:
    logits = torch.full((3, 100), float("nan"))
    logits[1, 40] = 1.0
    logits[2, [3, 5]] = float("inf")
    for changes in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}):
        given = settings(3, **changes)
        assert sample(logits, *given, torch.full((3,), 0.9).double()).tolist() == [0, 40, 3]


def test_rows_may_be_apart_and_do_not_matter_to_each_other() -> None:
    random = torch.Generator().manual_seed(2)
    wide = torch.randn(6, 1000, generator=random)
    uniform = torch.rand(6, generator=random, dtype=torch.float64)
    given = settings(6, top_p=0.8)
    together = sample(wide[:, :777], *given, uniform)
    for row in range(6):
        alone = sample(wide[row : row + 1, :777], *(x[row : row + 1] for x in given), uniform[row : row + 1])
        assert torch.equal(alone, together[row : row + 1])


def test_the_settings_that_cut_nothing_or_all_but_one() -> None:
    """top_k of 0, 1, all and more than all; top_p of 0 and 1; min_p of 1."""
    random = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 5000, generator=random).round()  # with ties
    uniforms = torch.rand(20, generator=random, dtype=torch.float64)
    for changes in (
        {"top_k": 0}, {"top_k": 1}, {"top_k": 5000}, {"top_k": 9999}, {"top_p": 0.0}, {"top_p": 1.0}, {"min_p": 1.0},
        {"top_k": 1, "top_p": 0.0, "min_p": 1.0},
    ):  # fmt: skip
        given = settings(20, **changes)
        rows = logits.expand(20, -1)
        assert torch.equal(sample(rows, *given, uniforms), sample_op.reference(rows, *given, uniforms)), changes


def test_infinite_logits_are_as_likely_as_logits_get() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 30] = float("inf")
    assert sample(logits, *settings(1), torch.tensor([0.9]).double()).tolist() == [30]


def test_tensors_need_not_be_contiguous() -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 8, generator=random).T
    given = [column[::2] for column in settings(16, top_k=40)]
    uniform = torch.rand(16, generator=random, dtype=torch.float64)[::2]
    assert torch.equal(sample(logits, *given, uniform), sample_op.reference(logits, *given, uniform))
    tokens = torch.arange(16)[::2]
    found, expected = token_logprobs(logits, tokens, 3), logprobs_op.reference(logits, tokens, 3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in logprobs_op.cases()])
def test_the_cases_of_token_logprobs(arguments: tuple[Tensor, Tensor, int]) -> None:
    logits, tokens, k = arguments
    logprobs, ranks, top_ids, top_logprobs = token_logprobs(logits, tokens, k)
    expected = logprobs_op.reference(logits.double(), tokens, k)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(ranks, expected[1])
    assert torch.equal(logits.gather(1, top_ids), logits.gather(1, expected[2]))
    torch.testing.assert_close(top_logprobs.double(), expected[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 20, 3000])
def test_logprobs_of_a_large_vocabulary(k: int) -> None:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 151_936, generator=random) * 4
    tokens = torch.randint(0, 151_936, (3,), generator=random)
    logprobs, ranks, top_ids, top_logprobs = token_logprobs(logits, tokens, k)
    exact = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(logprobs.double(), exact.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    assert torch.equal(ranks, (logits > logits.gather(1, tokens[:, None])).sum(1) + 1)
    assert torch.equal(top_ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    torch.testing.assert_close(top_logprobs.double(), exact.gather(1, top_ids), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set_passes_these_tests(isa: str, run_tests_with_isa: Any) -> None:
    run_tests_with_isa(isa, __file__)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in penalize_op.cases()])
def test_penalties_have_the_bits_of_the_reference(arguments: tuple[Any, ...]) -> None:
    logits, *rest = arguments
    expected, wide = logits.clone(), torch.full((logits.shape[0], logits.shape[1] + 5), 7.0)
    penalize_op.reference(expected, *rest)
    actual = wide[:, : logits.shape[1]]
    for _ in range(2):  # the memory to count in holds what the last call left there
        actual.copy_(logits)
        penalize(actual, *rest)
        assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
    assert (wide[:, logits.shape[1] :] == 7.0).all()


def test_penalties_refuse_tokens_that_are_apart() -> None:
    logits, *rest = dict(penalize_op.cases())["mixed"]
    with pytest.raises(ValueError, match="side by side"):
        penalize(logits.T.contiguous().T, *rest)
