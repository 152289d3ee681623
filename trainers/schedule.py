"""Learning-rate schedules, as a factor of the peak; a pure function of the step, so a resume needs no state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def factor(step: int, *, total: int, warmup: int, schedule: Schedule) -> float:
    """Share of the peak learning rate at a step.

    It climbs linearly over the first ``warmup`` steps, reaching 1 at the first step after them, and then stays
    (constant) or falls towards 0, which the step after the last would have (linear, cosine).

    Args:
        step: 0-based step about to be taken.
        total: Steps of the whole run.
        warmup: Steps of warm-up.
        schedule: Shape after the warm-up.

    Returns:
        A factor in [0, 1].
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
