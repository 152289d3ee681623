"""Bytes of state for one (m, n) matrix, by the published formulas; b bytes an element, r the rank, rho the density.

What is stored once for all matrices (a basis of n x n) is not in them.
"""

from __future__ import annotations


def adamw(m: int, n: int, b: int = 4) -> float:
    """Two moments: 2 m n b."""
    return 2 * m * n * b


def muon(m: int, n: int, b: int = 4) -> float:
    """One momentum: m n b."""
    return m * n * b


def frugal(m: int, n: int, rho: float, along: int, b: int = 4) -> float:
    """FRUGAL by rows, columns or blocks of them: 2 rho m n b, and 8 bytes for each index along the side that is cut."""
    return 2 * rho * m * n * b + 8 * rho * along


def galore(m: int, n: int, rho: float, b: int = 4) -> float:
    """Moments and projector, r = rho min(m, n): (2 max(m, n) r + min(m, n) r) b."""
    r = rho * min(m, n)
    return (2 * max(m, n) * r + min(m, n) * r) * b


def dct_adamw(m: int, n: int, r: int, b: int = 4) -> float:
    """Moments of the longer side's length, and two lists of indices for the rotation: 2 max(m, n) r b + 8 r."""
    return 2 * max(m, n) * r * b + 8 * r


def trion(m: int, n: int, r: int, b: int = 4) -> float:
    """One full momentum, and indices: m n b + 4 r."""
    return m * n * b + 4 * r
