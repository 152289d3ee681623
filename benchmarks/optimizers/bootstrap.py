"""Paired bootstrap: one draw of seeds and of units (articles, rows) serves every arm, so what is common cancels.

Seeds and units are drawn with replacement, independently of each other. With two to five seeds the spread between
seeds is known poorly, and the intervals are then rather too narrow than too wide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Losses = Mapping[str, NDArray[np.float64]]
DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high."""
        return self.low, self.high

    def contains(self, value: float) -> bool:
        """Whether a value lies within, ends included."""
        return self.low <= value <= self.high


def paired(
    statistic: Callable[[Losses], NDArray[np.float64]],
    nats: Mapping[str, NDArray[np.float64]],
    tokens: Sequence[int],
    *,
    draws: int = DRAWS,
) -> Interval:
    """A statistic of several arms' losses, with its interval.

    Args:
        statistic: From each arm's nats per token, an array of draws, to one number a draw.
        nats: Of each arm, summed nats of every unit, (seeds, units); the same seeds and units in the same order.
        tokens: Scored tokens of each unit.
        draws: How many bootstrap draws.

    Returns:
        The statistic of the data as they are, and the 2.5 and 97.5 percentiles over the draws.
    """
    seeds, units = next(iter(nats.values())).shape
    assert all(each.shape == (seeds, units) for each in nats.values()) and len(tokens) == units
    draw = np.random.default_rng(0)
    of_seeds = np.vstack([np.ones(seeds), draw.multinomial(seeds, np.full(seeds, 1 / seeds), draws)]) / seeds
    of_units = np.vstack([np.ones(units), draw.multinomial(units, np.full(units, 1 / units), draws)])
    scored = of_units @ np.asarray(tokens, dtype=np.float64)
    losses = {
        arm: np.einsum("ds,su,du->d", of_seeds, each, of_units, optimize=True) / scored for arm, each in nats.items()
    }
    found = statistic(losses)
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return Interval(float(found[0]), float(low), float(high))


def percent(arm: str, against: str) -> Callable[[Losses], NDArray[np.float64]]:
    """Statistic: by how many percent an arm's perplexity differs from another's; negative is better."""
    return lambda losses: 100 * np.expm1(losses[arm] - losses[against])
