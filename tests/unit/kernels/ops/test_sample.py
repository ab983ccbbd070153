"""The distribution that many uniforms bring out, and the edges that a contract case does not show."""

import math

import pytest
import torch

from tokenmill import kernels

LOGITS = torch.tensor([2.0, 1.0, 0.5, 2.0, -1.0, 0.0, 1.5, float("-inf")])


def settings(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return (
        torch.full((count,), temperature, dtype=torch.float32),
        torch.full((count,), top_k),
        torch.full((count,), top_p, dtype=torch.float32),
        torch.full((count,), min_p, dtype=torch.float32),
    )


def sample(logits, uniform, **changes):
    uniform = torch.as_tensor(uniform, dtype=torch.float64)
    return kernels.sample(logits.expand(len(uniform), -1), *settings(len(uniform), **changes), uniform)


def truncated(temperature=1.0, keep=range(8)):
    probabilities = torch.zeros(8, dtype=torch.float64)
    keep = list(keep)
    probabilities[keep] = (LOGITS.double() / temperature).softmax(0)[keep]
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, truncated()),
        ({"temperature": 0.5}, truncated(0.5)),
        ({"temperature": 3.0}, truncated(3.0)),
        ({"top_k": 3}, truncated(keep=[0, 3, 6])),
        ({"top_k": 1}, truncated(keep=[0])),
        ({"top_p": 0.5}, truncated(keep=[0, 3])),  # 0.29 + 0.29 reach it together
        ({"top_p": 1e-9}, truncated(keep=[0])),
        ({"min_p": 0.3}, truncated(keep=[0, 1, 3, 6])),  # exp(-1) passes, exp(-1.5) does not
        ({"min_p": 1.0}, truncated(keep=[0, 3])),
        ({"top_k": 4, "top_p": 0.7}, truncated(keep=[0, 3, 6])),  # of the four 0.34 + 0.34 + 0.2
        ({"top_k": 3, "min_p": 0.7}, truncated(keep=[0, 3])),
    ],
)
def test_tokens_come_as_often_as_their_probability(changes, expected):
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    frequency = torch.bincount(sample(LOGITS, uniform, **changes), minlength=8) / count
    assert torch.all(frequency[expected == 0] == 0)
    # Five standard deviations of a binomial count.
    assert torch.all((frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt())


def test_chi_square_over_a_large_vocabulary():
    vocabulary, count = 1000, 20_000
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(vocabulary, generator=random)
    uniform = torch.rand(count, generator=random, dtype=torch.float64)
    observed = torch.cat(
        [torch.bincount(sample(logits, part), minlength=vocabulary)[None] for part in uniform.split(2000)]
    )
    expected = logits.double().softmax(0) * count
    statistic = ((observed.sum(0) - expected) ** 2 / expected).sum().item()
    degrees = vocabulary - 1
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_evenly_spaced_uniforms_hit_every_interval_exactly():
    count = 8192
    tokens = sample(LOGITS, (torch.arange(count) + 0.5) / count)
    assert torch.equal(tokens, tokens.sort().values)  # in order of ids when nothing is cut
    assert (torch.bincount(tokens, minlength=8) / count - truncated()).abs().max() < 2 / count


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.99}, {"temperature": 1e-30}, {"temperature": 100.0}])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_give_possible_tokens(changes, uniform):
    logits = torch.tensor([float("-inf"), 3.0, float("-inf"), 1.0, -2e4, float("-inf")])
    assert sample(logits, [uniform], **changes).item() in (1, 3)


def test_greedy_takes_the_lowest_id_of_equals():
    assert sample(LOGITS, [0.99], temperature=0.0).tolist() == [0]
    assert sample(LOGITS.flip(0), [0.99], temperature=0.0).tolist() == [4]


def test_equals_at_the_edge_of_top_k_are_kept_by_id():
    equal = torch.zeros(20_000)
    uniform = (torch.arange(50) + 0.5) / 50
    assert sample(equal, uniform, top_k=50).tolist() == list(range(50))


def test_cuts_that_reach_beyond_the_first_candidates():
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(20_000, generator=random)
    order = logits.sort(descending=True).indices.tolist()
    last = 1 - 2**-53
    assert sample(logits, [last] * 3, top_k=300).tolist() == [order[299]] * 3
    assert sample(logits, [last], top_k=9000).tolist() == [order[8999]]
    cumulative = logits.double().softmax(0).sort(descending=True).values.cumsum(0)
    half = int((cumulative < 0.5).sum())
    assert 256 < half < 20_000
    assert sample(logits, [last], top_p=0.5).item() in order[half - 1 : half + 2]


def test_not_a_number_gives_a_token_and_leaves_other_rows_alone():
    logits = torch.stack([LOGITS, torch.full((8,), float("nan")), LOGITS])
    uniform = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    for changes in ({}, {"top_p": 0.8}):
        tokens = kernels.sample(logits, *settings(3, **changes), uniform)
        assert 0 <= tokens[1] < 8
        assert torch.equal(tokens[[0, 2]], sample(LOGITS, [0.2, 0.9], **changes))
