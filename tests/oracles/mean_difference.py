"""The mean difference from its definition, in float64 NumPy, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_difference(positive: Sequence[Array], negative: Sequence[Array]) -> tuple[Array, Array]:
    """Give directions and median norms.

    Args:
        positive: per row the activations of the tokens that count, (L, n_i, D).
        negative: the same of the contrasting texts.

    Returns:
        (L, D) difference of the means over rows of the means over tokens; (L,) median norm over all tokens.
    """
    layers, _, width = positive[0].shape
    direction = np.zeros((layers, width))
    medians = np.zeros(layers)
    for layer in range(layers):
        for rows, sign in ((positive, 1.0), (negative, -1.0)):
            for row in rows:
                n = row.shape[1]
                for token in range(n):
                    direction[layer] += sign * row[layer, token] / n / len(rows)
        norms = sorted(
            float(np.sqrt(np.sum(row[layer, token] ** 2)))
            for row in (*positive, *negative)
            for token in range(row.shape[1])
        )
        half = len(norms) // 2
        medians[layer] = norms[half] if len(norms) % 2 else (norms[half - 1] + norms[half]) / 2
    return direction, medians
