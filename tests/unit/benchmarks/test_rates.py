"""Grids of learning rates: centred, widened where the best is at an edge, refined near the best."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from benchmarks.optimizers import rates


def test_a_grid_is_centred_on_the_published_value() -> None:
    grid = rates.centred(1e-3, 4, 2.0)
    assert all(b / a == pytest.approx(2) for a, b in pairwise(grid))
    assert math.prod(grid) ** 0.25 == pytest.approx(1e-3)
    assert rates.centred(1e-3, 3, 3.0)[1] == 1e-3


def tried(*losses: float) -> dict[float, float]:
    return dict(zip(rates.centred(1.0, len(losses), 2.0), losses, strict=True))


def test_the_grid_itself_comes_first_and_only_what_is_missing() -> None:
    grid = rates.centred(1.0, 4, 2.0)
    assert rates.missing(1.0, {}, count=4, factor=2.0) == grid
    assert rates.missing(1.0, {grid[1]: 3.0, grid[3]: 1.0}, count=4, factor=2.0) == [grid[0], grid[2]]


def test_an_inner_best_settles_the_grid() -> None:
    assert rates.missing(1.0, tried(3, 1, 2, 4), count=4, factor=2.0) == []


def test_the_grid_grows_beyond_the_edge_that_is_best_and_so_far() -> None:
    scores = tried(4, 3, 2, 1)
    assert rates.missing(1.0, scores, count=4, factor=2.0) == [2 * max(scores)]
    down = tried(1, 2, 3, 4)
    assert rates.missing(1.0, down, count=4, factor=2.0) == [min(down) / 2]
    for _ in range(rates.WIDEST):
        [further] = rates.missing(1.0, scores, count=4, factor=2.0)
        scores[further] = min(scores.values()) - 1
    assert rates.missing(1.0, scores, count=4, factor=2.0) == [] and rates.at_edge(scores)


def test_a_diverged_rate_is_never_the_best_and_of_equal_ones_the_lower_is() -> None:
    assert rates.best({0.5: 2.0, 1.0: math.inf, 0.25: 2.0}) == 0.25


def test_refinements_lie_near_the_best_are_new_and_belong_to_no_grid() -> None:
    scores = tried(3, 1, 2, 4)
    first = rates.best(scores)
    seen = []
    for _ in range(5):
        rate = rates.between(scores, 2.0)
        assert not any(math.isclose(rate, other) for other in scores)
        assert first / 2 < rate < 2 * first
        assert not rates.on_grid(rate, 1.0, count=4, factor=2.0)
        seen.append(rate)
        scores[rate] = 5.0
    assert seen[:2] == [first * math.sqrt(2), first / math.sqrt(2)]


def test_widened_rates_belong_to_the_grid() -> None:
    for centre, count, factor in ((1e-3, 4, 2.0), (2e-5, 3, 3.0)):
        grid = rates.centred(centre, count, factor)
        assert all(rates.on_grid(rate, centre, count=count, factor=factor) for rate in grid)
        assert rates.on_grid(grid[-1] * factor * factor, centre, count=count, factor=factor)
        assert rates.on_grid(grid[0] / factor, centre, count=count, factor=factor)
