"""Trion for one matrix, from the mathematics, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.unit.trainers.optim.oracles.bases import Array, top

MUON = [(3.4445, -4.7750, 2.0315)] * 5
KERNEL = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def newton_schulz(x: Array, coefficients: list[tuple[float, float, float]]) -> Array:
    """X <- (a I + b X X^T + c (X X^T)^2) X, five times, on the matrix itself."""
    x = x / (np.linalg.norm(x) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def run(
    w: Array,
    grads: list[Array | None],
    *,
    basis: Callable[[int], Array],
    rank: int,
    right: bool | None = None,
    lr: float = 0.02,
    momentum: float = 0.95,
    norm: int = 1,
    weight_decay: float = 0.0,
    scale: str = "kj",
    coefficients: list[tuple[float, float, float]] = MUON,
) -> tuple[Array, Array, list[list[int]]]:
    """All steps of one matrix.

    Returns:
        Weights and momentum at the end, and the vectors chosen in each step.
    """
    rows, columns = w.shape
    right = rows >= columns if right is None else right
    n = columns if right else rows
    q_all, r = basis(n), min(rank, n)
    factor = {
        "kj": max(1.0, rows / columns) ** 0.5,
        "none": 1.0,
        "kimi": 0.2 * max(rows, columns) ** 0.5,
        "dion": (rows / columns) ** 0.5,
    }[scale]
    m = np.zeros_like(w)
    history = []
    for g in grads:
        if g is None:
            continue
        m = m + g
        s = m @ q_all.T if right else q_all @ m
        magnitudes = np.abs(s) if norm == 1 else s * s
        chosen = sorted(top(magnitudes.sum(0 if right else 1), r))
        q = q_all[chosen]
        a = m @ q.T if right else q @ m
        o = newton_schulz(a, coefficients)
        m = m - (1 - momentum) * (a @ q if right else q.T @ a)
        w = (1 - lr * weight_decay) * w - lr * factor * (o @ q if right else q.T @ o)
        history.append(chosen)
    return w, m, history
