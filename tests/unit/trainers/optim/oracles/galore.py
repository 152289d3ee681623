"""GaLore from its formulas, in float64 NumPy, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def galore(
    w: Array,
    gradients: Sequence[Array],
    bases: dict[int, tuple[Array, Array]],
    *,
    lr: float,
    scale: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Array:
    """Runs GaLore.

    Args:
        w: Weights (m, n).
        gradients: One a step.
        bases: From a step on, (A, B): A (m, a) and B (b, n), the identity on a side that is not projected.
        lr: Learning rate.
        scale: Of the update.
        beta1: Decay of the mean.
        beta2: Decay of the mean square.
        eps: Added before bias correction.
        weight_decay: Taken off after the update.

    Returns:
        Weights after the last step.
    """
    w = w.copy()
    left, right = bases[1]
    m = v = np.zeros((left.shape[1], right.shape[0]))
    for t, g in enumerate(gradients, start=1):
        left, right = bases.get(t, (left, right))
        low = left.T @ g @ right.T
        m = beta1 * m + (1 - beta1) * low
        v = beta2 * v + (1 - beta2) * low**2
        size = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        w = w - size * scale * (left @ (m / (np.sqrt(v) + eps)) @ right)
        w = w - lr * weight_decay * w
    return w
