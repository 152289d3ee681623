"""What a zeroth-order step leaves behind: two numbers, from which it can be taken again."""

from __future__ import annotations

import math
from typing import NamedTuple


class Record(NamedTuple):
    """One direction of one step.

    The tensors after a run are a function of the tensors before it and its records: ``Qzo.replay`` gives them bit for
    bit. A step with several directions has one record for each, in order, with the same ``step``.
    """

    step: int
    """Steps taken, this one included: the first step is 1."""
    seed: int
    """Of the noise."""
    d_raw: float
    """Estimated derivative of the loss along the direction, per unit of it; not finite where the loss was not."""
    d_applied: float
    """What the step multiplied the direction with, before the learning rate and the mean over directions."""
    lr: float
    """Learning rate of the step."""
    loss_plus: float
    """Loss ahead of the point."""
    loss_minus: float
    """Loss behind the point; at the point itself, where only one side is looked at."""
    clipped: bool
    """Whether a threshold cut ``d_raw``."""
    direction: int = 0
    """Which of the step's directions."""

    @property
    def skipped(self) -> bool:
        """Whether the loss was not finite, so that there is no derivative."""
        return not math.isfinite(self.d_raw)
