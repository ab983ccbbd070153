"""What each sampling parameter does, that a choice depends on its row alone, and the uniforms behind it."""

import math

import numpy as np
import pytest
import torch

from tokenmill import kernels
from tokenmill.engine.plan import SampleRow
from tokenmill.engine.sampler import prompt_logprobs, sample_rows, uniforms
from tokenmill.types import SamplingParams

V = 12
LOGITS = torch.tensor([0.0, 3.0, 2.9, 1.0, -1.0, 2.0, -2.0, 0.5, 1.5, -0.5, 2.5, 0.2])


def row(history=(), prompt_len=0, seed=1, stop_ids=(), **params):
    history = list(history)
    return SampleRow(
        request_id="r",
        params=SamplingParams(**{"temperature": 0.0, **params}),
        seed=seed,
        position=len(history),
        generated=len(history) - prompt_len,
        history=history,
        prompt_len=prompt_len,
        stop_ids=stop_ids,
    )


def choose(*rows, logits=LOGITS):
    return sample_rows(logits.repeat(len(rows), 1), rows).token_ids


def reachable(count=3000, **params):
    """Tokens that come up at temperature 1."""
    rows = [row(seed=seed, temperature=1.0, **params) for seed in range(count)]
    return set(choose(*rows))


def test_greedy_takes_the_most_likely():
    assert choose(row()) == [1]
    assert choose(row(temperature=1.0, top_k=1)) == [1]


def test_allowed_tokens():
    assert choose(row(allowed_token_ids=[4, 7])) == [7]
    assert reachable(allowed_token_ids=[4, 7, 3]) == {3, 4, 7}


def test_bad_words_are_forbidden_once_their_beginning_stands():
    assert choose(row(bad_words_ids=[[1]])) == [2]
    assert choose(row([5, 6], 1, bad_words_ids=[[5, 6, 1], [2]])) == [10]
    assert choose(row([6, 5], 1, bad_words_ids=[[5, 6, 1]])) == [1]
    assert choose(row([6], 1, bad_words_ids=[[5, 6, 1]])) == [1]
    assert choose(row([], 0, bad_words_ids=[[5, 1]])) == [1]


def test_stop_tokens_are_forbidden_until_min_tokens():
    stops = {"stop_ids": (1, 2), "min_tokens": 2}
    assert choose(row([3], 1, **stops)) == [10]
    assert choose(row([3, 3], 1, **stops)) == [10]
    assert choose(row([3, 3, 3], 1, **stops)) == [1]


def test_logit_bias():
    assert choose(row(logit_bias={4: 5.0})) == [4]
    assert choose(row(logit_bias={1: -100.0, 2: -0.5})) == [10]


def test_bias_does_not_bring_back_what_is_forbidden():
    assert choose(row(logit_bias={4: 100.0}, allowed_token_ids=[5])) == [5]


def test_repetition_penalty_counts_prompt_and_output():
    assert choose(row([1], 1, repetition_penalty=1.5)) == [2]  # 3 / 1.5 = 2 < 2.9
    assert choose(row([1, 2], 1, repetition_penalty=1.5)) == [10]
    assert choose(row([1, 1, 1], 1, repetition_penalty=1.02)) == [1]  # once, however often it occurred: 2.94


def test_repetition_penalty_lowers_negative_logits_too():
    logits = torch.tensor([-1.0, -1.2])
    assert choose(row([0], 1, repetition_penalty=1.1), logits=logits) == [0]
    assert choose(row([0], 1, repetition_penalty=1.3), logits=logits) == [1]


def test_presence_and_frequency_penalties_count_the_output_only():
    assert choose(row([1, 1, 1], 3, presence_penalty=2.0, frequency_penalty=2.0)) == [1]
    assert choose(row([0, 1, 1], 1, presence_penalty=0.09)) == [1]
    assert choose(row([0, 1, 1], 1, presence_penalty=0.11)) == [2]
    assert choose(row([0, 1, 1], 1, frequency_penalty=0.04)) == [1]
    assert choose(row([0, 1, 1], 1, frequency_penalty=0.06)) == [2]
    assert choose(row([0, 4], 1, presence_penalty=-2.0, frequency_penalty=-2.0, logit_bias={4: 0.1})) == [4]


def test_cuts_limit_what_can_come_up():
    assert reachable(top_k=3) == {1, 2, 10}
    assert reachable(top_k=-1) == set(range(V))
    assert reachable(top_p=0.3) == {1, 2}
    assert reachable(min_p=0.9) == {1, 2}


def test_a_seed_decides_and_another_seed_decides_otherwise():
    rows = [row(seed=seed, temperature=1.0) for seed in range(50)]
    assert choose(*rows) == choose(*rows)
    assert choose(*rows) != choose(*[row(seed=seed + 50, temperature=1.0) for seed in range(50)])


def test_a_choice_depends_on_its_row_alone():
    kinds = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 4, "logprobs": 2},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 1.0, "allowed_token_ids": [1, 5, 9]},
    ]
    rows = [row([3, 1, seed % V], 1, seed=seed, **kinds[seed % len(kinds)]) for seed in range(48)]
    logits = torch.randn(48, V, generator=torch.Generator().manual_seed(0))
    together = sample_rows(logits.clone(), rows)
    for index, one in enumerate(rows):
        alone = sample_rows(logits[index : index + 1].clone(), [one])
        assert alone.token_ids == [together.token_ids[index]]
        assert alone.logprobs == [together.logprobs[index]]


def test_what_a_row_asks_for_changes_its_own_logits_alone():
    logits = LOGITS.repeat(3, 1)
    rows = [row([1, 2], 1, allowed_token_ids=[1], logit_bias={1: 3.0}, presence_penalty=1.0), row(logprobs=1), row()]
    sample_rows(logits, rows)
    assert not torch.equal(logits[0], LOGITS)
    assert torch.equal(logits[1:], LOGITS.repeat(2, 1))


@pytest.mark.parametrize("asked", [{"top_k": 1}, {"top_k": 7, "top_p": 0.9}, {"min_p": 0.2}, {"top_p": 0.0001}, {}])
def test_native_and_plain_sampling_choose_alike(asked, monkeypatch):
    """Over seeds, ties included, and with penalties before."""
    logits = LOGITS.clone()
    logits[3:9] = logits[1]
    rows = [row([3, 4, 4], 1, seed=seed, temperature=0.9, frequency_penalty=0.3, **asked) for seed in range(64)]
    chosen = choose(*rows, logits=logits)
    monkeypatch.setattr(kernels, "sample", kernels.sample.reference)
    monkeypatch.setattr(kernels, "token_logprobs", kernels.token_logprobs.reference)
    assert choose(*rows, logits=logits) == chosen


def test_logprobs_are_those_of_the_raw_logits():
    expected = LOGITS.double().log_softmax(0)
    asked = row([], 0, logprobs=2, allowed_token_ids=[5], temperature=0.5)
    none, zero, two = sample_rows(LOGITS.repeat(3, 1), [row(), row(logprobs=0), asked]).logprobs
    assert none is None
    assert (zero.token_ids, zero.rank) == ([1], 1)
    assert zero.logprobs == pytest.approx([expected[1].item()], abs=1e-5)
    assert (two.token_ids, two.rank) == ([5, 1, 2], 4)
    assert two.logprobs == pytest.approx([expected[token].item() for token in (5, 1, 2)], abs=1e-5)


def test_no_more_logprobs_than_tokens():
    (found,) = sample_rows(LOGITS[None], [row(logprobs=64)]).logprobs
    assert len(found.token_ids) == len(found.logprobs) == V + 1
    assert sum(math.exp(x) for x in found.logprobs[1:]) == pytest.approx(1, abs=1e-5)


def test_half_precision_logits():
    logits = LOGITS.bfloat16()
    sampled = sample_rows(logits[None], [row(logprobs=0)])
    assert sampled.token_ids == [1]
    assert sampled.logprobs[0].logprobs == pytest.approx([logits.double().log_softmax(0)[1].item()], abs=1e-5)


@pytest.mark.parametrize("length", [0, 1, 64, 150])
def test_prompt_logprobs(length):
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(length, V, generator=random)
    tokens = torch.randint(0, V, (length,), generator=random).tolist()
    found = prompt_logprobs(logits, tokens, 3)
    expected = logits.double().log_softmax(-1)
    assert [entry.token_ids[0] for entry in found] == tokens
    for position, entry in enumerate(found):
        order = expected[position].sort(descending=True).indices.tolist()
        assert entry.token_ids[1:] == order[:3]
        assert entry.rank == order.index(tokens[position]) + 1
        assert entry.logprobs == pytest.approx(
            [expected[position, token].item() for token in entry.token_ids], abs=1e-5
        )


def test_uniforms_are_what_they_always_were():
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63)], [0, 1, 2**20, 7, 0]
    assert uniforms(seeds, positions).tolist() == [
        0.6524484863740322,
        0.9435642308648544,
        0.6439801416380194,
        0.6572466933996467,
        0.5267879311465462,
    ]


def splitmix64(seed, position):
    """The generator written out in Python integers."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    state = mix((seed + gamma) & mask)
    return (mix((state + (position + 1) * gamma) & mask) >> 11) * 2.0**-53


def test_uniforms_agree_with_the_definition():
    random = np.random.default_rng(0)
    seeds = random.integers(-(2**63), 2**63, 200, dtype=np.int64).tolist()
    positions = random.integers(0, 2**31, 200).tolist()
    assert uniforms(seeds, positions).tolist() == [splitmix64(*pair) for pair in zip(seeds, positions, strict=True)]


def draws():
    """Runs of numbers along positions, along seeds, and along both."""
    count = 20_000
    steps = list(range(count))
    yield uniforms([123] * count, steps)
    yield uniforms(steps, [17] * count)
    yield uniforms(steps, steps)
    yield uniforms([seed << 32 for seed in steps], [5] * count)


@pytest.mark.parametrize("values", list(draws()), ids=["positions", "seeds", "both", "high_bits"])
def test_uniforms_are_spread_evenly_and_independent(values):
    count = len(values)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    bins = np.bincount((values * 100).astype(int), minlength=100)
    chi_square = ((bins - count / 100) ** 2 / (count / 100)).sum()
    assert abs(chi_square - 99) < 5 * math.sqrt(2 * 99)
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / math.sqrt(count)
    assert len(np.unique(values)) == count


def test_neighbouring_seeds_are_unrelated():
    positions = list(range(5000))
    one, two = uniforms([41] * 5000, positions), uniforms([42] * 5000, positions)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(5000)
    assert not set(one) & set(two)
