"""DCT-AdamW for one matrix, from the mathematics, in float64: dense bases, dense rotations, plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.unit.trainers.optim.oracles.bases import Array, top


def quantised(x: Array, bits: int, block: int = 256) -> Array:
    """What blockwise min/max coding of each row leaves of a matrix."""
    levels = 2**bits - 1
    out = x.copy()
    for row in out:
        for start in range(0, len(row), block):
            part = row[start : start + block]
            low, high = part.min(), part.max()
            if high > low:
                step = (high - low) / levels
                part[:] = low + step * np.clip(np.floor((part - low) / step + 0.5), 0, levels)
    return out


def adamw(w: Array, grads: list[Array | None], *, lr: float, betas: Any, eps: float, weight_decay: float) -> Array:
    """Plain AdamW."""
    m, v, t = np.zeros_like(w), np.zeros_like(w), 0
    for g in grads:
        if g is not None:
            t += 1
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            w = (1 - lr * weight_decay) * w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return w


def run(
    w: Array,
    grads: list[Array | None],
    *,
    basis: Callable[[int], Array],
    rank: int,
    right: bool | None = None,
    update_gap: int = 1,
    rotate: bool = True,
    norm: int = 1,
    feedback: str = "none",
    ages: bool = False,
    hysteresis: float = 0.0,
    by_score: bool = False,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Array, list[list[int]]]:
    """All steps of one matrix.

    Returns:
        The weights at the end, and the vectors kept in each step, slot by slot.
    """
    right = w.shape[0] >= w.shape[1] if right is None else right
    n = w.shape[1] if right else w.shape[0]
    q_all, r = basis(n), min(rank, n)
    turned = (lambda x: x) if right else (lambda x: x.T)
    rows = turned(w).shape[0]
    m, v, e = np.zeros((rows, r)), np.zeros((rows, r)), np.zeros((rows, n))
    age, t = np.zeros(r), 0
    kept: list[int] = []
    history = []
    for g in grads:
        if g is None:
            continue
        t += 1
        a_full = turned(g) + e
        if t == 1 or t % update_gap == 0:
            s = a_full @ q_all.T
            scores = np.abs(s).sum(0) if norm == 1 else (s * s).sum(0)
            if kept:
                scores[kept] *= 1 + hysteresis
            chosen = top(scores, r)
            before = kept
            if by_score:
                kept = chosen
            elif not before:
                kept = sorted(chosen)
            else:
                newcomers = iter(sorted(set(chosen) - set(before)))
                kept = [k if k in chosen else next(newcomers) for k in before]
            if rotate and before:
                dense = q_all[before] @ q_all[kept].T
                # A partial permutation up to rounding, which would act on a zero in v like an accidental eps.
                rotation = np.round(dense)
                assert np.abs(dense - rotation).max() < 1e-13
                m, v = m @ rotation, np.abs(v @ rotation)
                age = np.round(age @ rotation)
        q = q_all[kept]
        a = a_full @ q.T
        rest = a_full - a @ q
        if feedback == "full":
            e = rest
        elif feedback != "none":
            e = quantised(rest, int(feedback[0]))
        m, v = betas[0] * m + (1 - betas[0]) * a, betas[1] * v + (1 - betas[1]) * a * a
        age = age + 1
        old = age if ages else float(t)
        u = (m / (1 - betas[0] ** old)) / (np.sqrt(v / (1 - betas[1] ** old)) + eps)
        w = (1 - lr * weight_decay) * w - lr * turned(u @ q)
        history.append(list(kept))
    return w, history
