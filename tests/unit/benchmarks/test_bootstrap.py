"""Paired intervals: what is common to both arms cancels, and a fixed ratio has an interval of no width."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.optimizers.bootstrap import Interval, paired, percent

DRAW = np.random.default_rng(1)
TOKENS = [int(count) for count in DRAW.integers(50, 500, 30)]


def arm(level: float, spread: float = 0.0, seeds: int = 3) -> np.ndarray:
    return (level + spread * DRAW.standard_normal((seeds, 30))) * np.array(TOKENS)


def test_the_value_is_that_of_all_tokens_together() -> None:
    nats = {"it": arm(3.0, 0.3), "other": arm(3.1, 0.3)}
    found = paired(percent("it", "other"), nats, TOKENS, draws=200)
    means = {name: each.sum() / (3 * sum(TOKENS)) for name, each in nats.items()}
    assert found.value == pytest.approx(100 * (math.exp(means["it"] - means["other"]) - 1), rel=1e-12)
    assert found.low < found.value < found.high


def test_a_constant_difference_is_certain_however_much_articles_differ() -> None:
    base = arm(3.0, 1.0)
    nats = {"it": base - 0.05 * np.array(TOKENS), "other": base}
    found = paired(percent("it", "other"), nats, TOKENS)
    expected = 100 * math.expm1(-0.05)
    assert found.low == pytest.approx(expected) and found.high == pytest.approx(expected)


def test_seeds_that_disagree_widen_the_interval() -> None:
    per_seed = np.array([-0.1, 0.0, 0.1])[:, None] * np.array(TOKENS)
    base = arm(3.0)
    found = paired(percent("it", "other"), {"it": base + per_seed, "other": base}, TOKENS)
    assert found.low < -5 and found.high > 5


def test_coverage_is_near_95_percent_over_articles() -> None:
    covered = 0
    for trial in range(200):
        draw = np.random.default_rng(trial)
        noise = draw.standard_normal((1, 40)) * 100
        base = np.full((5, 40), 300.0)
        it = base + np.repeat(noise, 5, axis=0)  # the articles differ, seeds agree
        found = paired(lambda losses: losses["it"] - losses["other"], {"it": it, "other": base}, [100] * 40, draws=400)
        covered += found.contains(0.0)
    assert 0.88 <= covered / 200 <= 0.98


def test_it_is_the_same_every_time() -> None:
    nats = {"it": arm(3.0, 0.3), "other": arm(3.1, 0.3)}
    assert paired(percent("it", "other"), nats, TOKENS) == paired(percent("it", "other"), nats, TOKENS)


def test_ends_belong_to_an_interval() -> None:
    assert Interval(1.0, 0.0, 2.0).contains(0.0) and not Interval(1.0, 0.1, 2.0).contains(0.0)
