"""Choosing a learning rate: a grid around the published value, widened where the best is at an edge, refined on demand.

Scores map a rate to its loss on dev; lower is better, and a diverged run is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

WIDEST = 3
"""Rates added beyond the edges of a grid, at most."""


def centred(centre: float, count: int, factor: float) -> list[float]:
    """``count`` rates, each ``factor`` times the one before, whose geometric mean is ``centre``."""
    return [centre * factor ** (index - (count - 1) / 2) for index in range(count)]


def best(scores: Mapping[float, float]) -> float:
    """The rate of the lowest score; the lower of two that are equal."""
    return min(scores, key=lambda rate: (scores[rate], rate))


def at_edge(scores: Mapping[float, float]) -> bool:
    """Whether a rate beyond those tried might have been better."""
    return best(scores) in (min(scores), max(scores))


def missing(centre: float, scores: Mapping[float, float], *, count: int, factor: float) -> list[float]:
    """Rates of the grid still to try: the grid itself, then one beyond the edge that is best; empty when settled.

    Args:
        centre: The published value.
        scores: What was tried, this grid's rates alone.
        count: Rates of the grid before it is widened.
        factor: Between neighbours.
    """
    if left := [rate for rate in centred(centre, count, factor) if rate not in scores]:
        return left
    if not at_edge(scores) or len(scores) >= count + WIDEST:
        return []
    winner = best(scores)
    return [winner * factor if winner == max(scores) else winner / factor]


def on_grid(rate: float, centre: float, *, count: int, factor: float) -> bool:
    """Whether a rate belongs to the grid around ``centre`` or to what widened it, not to a refinement."""
    place = math.log(rate / centre, factor) + (count - 1) / 2
    return math.isclose(place, round(place), abs_tol=1e-6)


def between(scores: Mapping[float, float], factor: float) -> float:
    """A rate not yet tried near the best: half way (geometrically) to a neighbour, above first, then closer."""
    winner, step = best(scores), math.sqrt(factor)
    while True:
        for rate in (winner * step, winner / step):
            if not _tried(rate, scores):
                return rate
        step = math.sqrt(step)


def _tried(rate: float, tried: Iterable[float]) -> bool:
    return any(math.isclose(rate, other, rel_tol=1e-9) for other in tried)
