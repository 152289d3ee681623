"""Orthonormal bases from their definitions, in float64: row k of each matrix is basis vector k."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cosines(n: int) -> Array:
    """DCT-II: sqrt(2 / n) cos(pi k (2 j + 1) / (2 n)), row 0 times sqrt(1 / 2)."""
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    matrix = np.sqrt(2 / n) * np.cos(np.pi * (k * (2 * j + 1) % (4 * n)) / (2 * n))
    matrix[0] /= np.sqrt(2)
    return matrix


def hadamard(n: int) -> Array:
    """(-1)^popcount(i & j) / sqrt(p) for the largest power of two p in n, times the cosines of n / p."""
    power = 1
    while n % (2 * power) == 0:
        power *= 2
    signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(power)] for i in range(power)])
    return np.kron(signs / np.sqrt(power), cosines(n // power))


def identity(n: int) -> Array:
    """The axes."""
    return np.eye(n)


def top(scores: Array, r: int) -> list[int]:
    """The r highest, highest first, the lowest number first among equals."""
    return sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:r]
