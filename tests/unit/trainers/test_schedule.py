"""Warm-up, peak and end of each schedule."""

from __future__ import annotations

import math

import pytest

from trainers.schedule import factor


def test_warms_up_to_the_peak() -> None:
    rates = [factor(step, total=10, warmup=3, schedule="constant") for step in range(10)]
    assert rates == [0.25, 0.5, 0.75] + [1.0] * 7


def test_linear_reaches_zero_just_after_the_last_step() -> None:
    rates = [factor(step, total=6, warmup=2, schedule="linear") for step in range(7)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_is_half_a_wave() -> None:
    rates = [factor(step, total=4, warmup=0, schedule="cosine") for step in range(5)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_stays_within_zero_and_one_and_never_rises_after_the_warm_up(schedule: str) -> None:
    for total in (1, 2, 7):
        for warmup in range(total + 2):
            rates = [factor(step, total=total, warmup=warmup, schedule=schedule) for step in range(total + 3)]  # type: ignore[arg-type]
            assert all(0 <= rate <= 1 for rate in rates)
            assert all(later <= rate for rate, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
