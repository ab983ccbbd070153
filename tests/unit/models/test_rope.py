from __future__ import annotations

import math

import pytest

from tokenmill.models.rope import Linear, Llama3, LongRope, RopeSpec, Yarn


def test_pairs_turn_slower_and_slower() -> None:
    assert RopeSpec(10000.0, 8).frequencies(100) == pytest.approx((1.0, 0.1, 0.01, 0.001))


def test_linear_divides_all() -> None:
    plain, scaled = RopeSpec(100.0, 4), RopeSpec(100.0, 4, Linear(4.0))
    assert scaled.frequencies(1) == pytest.approx([f / 4 for f in plain.frequencies(1)])


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    rope = RopeSpec(500000.0, 128, Llama3(8.0, 1.0, 4.0, 8192))
    plain, scaled = RopeSpec(500000.0, 128).frequencies(1), rope.frequencies(1)
    kept = [s == pytest.approx(p) for s, p in zip(scaled, plain, strict=True)]
    divided = [s == pytest.approx(p / 8) for s, p in zip(scaled, plain, strict=True)]
    turns = [8192 * p / (2 * math.pi) for p in plain]
    assert kept == [t >= 4 for t in turns]
    assert divided == [t <= 1 for t in turns]
    assert sorted(scaled, reverse=True) == list(scaled)


def test_yarn_keeps_the_fastest_divides_the_slowest_and_sharpens() -> None:
    rope = RopeSpec(10000.0, 64, Yarn(4.0, 2048, 1.1386))
    plain, scaled = RopeSpec(10000.0, 64).frequencies(1), rope.frequencies(1)
    assert scaled[0] == pytest.approx(plain[0])
    assert scaled[-1] == pytest.approx(plain[-1] / 4)
    assert rope.attention_factor == 1.1386


def test_yarn_with_both_ends_on_one_dimension_is_a_step() -> None:
    rope = RopeSpec(10000.0, 8, Yarn(4.0, 2048, 1.0, beta_fast=1.0, beta_slow=1.0, truncate=False))
    plain = RopeSpec(10000.0, 8).frequencies(1)
    ratios = [p / s for p, s in zip(plain, rope.frequencies(1), strict=True)]
    assert ratios == pytest.approx([1.0, 1.0, 1.0, 4.0])


def test_longrope_picks_its_list_by_the_longest_sequence() -> None:
    rope = RopeSpec(10000.0, 4, LongRope((1.0, 1.0), (2.0, 4.0), 100, 1.2))
    assert rope.frequencies(100) == pytest.approx((1.0, 0.01))
    assert rope.frequencies(101) == pytest.approx((0.5, 0.0025))
