"""DCT-AdamW in a basis learned for one type of layer, from the mathematics, in float64; looked at from the right."""

from __future__ import annotations

import numpy as np

from tests.unit.trainers.optim.oracles.bases import Array, top


def eigenbasis(total: Array) -> Array:
    """Eigenvectors as rows, highest eigenvalue first, the largest entry of each positive."""
    rows = np.linalg.eigh(total)[1].T[::-1]
    return np.array([row * (-1.0 if row[np.abs(row).argmax()] < 0 else 1.0) for row in rows])


def run(
    weights: list[Array],
    grads: list[list[Array]],
    *,
    rank: int,
    learn_steps: int,
    learn_gap: int,
    ages: bool,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[list[Array], list[Array]]:
    """All steps of several matrices of one type.

    Returns:
        Their weights at the end, and every basis that was used.
    """
    n = weights[0].shape[1]
    weights = [w.copy() for w in weights]
    states = [{"m": np.zeros((len(w), rank)), "v": np.zeros((len(w), rank)), "age": np.zeros(rank)} for w in weights]
    kept: list[list[int]] = [[] for _ in weights]
    total, bases = np.zeros((n, n)), []
    for t, step in enumerate(grads, start=1):
        since = (t - learn_steps) % learn_gap
        if t <= learn_steps or since == 0 or since > learn_gap - learn_steps:
            total = total + sum(g.T @ g / np.trace(g.T @ g) for g in step)
        if t == 1 or t == learn_steps or (t > learn_steps and since == 0):
            bases.append(eigenbasis(total))
            if t >= learn_steps:
                total = np.zeros((n, n))
            if len(bases) > 1:
                for number, s in enumerate(states):
                    overlap = bases[-2][kept[number]] @ bases[-1].T
                    now = sorted(top(s["v"].sum(0) @ overlap**2, rank))
                    s["m"], s["v"] = s["m"] @ overlap[:, now], s["v"] @ overlap[:, now] ** 2
                    s["age"] = np.round(s["age"] @ overlap[:, now] ** 2)
                    kept[number] = now
        for number, (g, s) in enumerate(zip(step, states, strict=True)):
            coordinates = g @ bases[-1].T
            chosen = top(np.abs(coordinates).sum(0), rank)
            before = kept[number]
            newcomers = iter(sorted(set(chosen) - set(before)))
            kept[number] = [k if k in chosen else next(newcomers) for k in before] if before else sorted(chosen)
            for slot, k in enumerate(before):
                if kept[number][slot] != k:
                    s["m"][:, slot], s["v"][:, slot], s["age"][slot] = 0, 0, 0
            a = coordinates[:, kept[number]]
            s["m"], s["v"] = betas[0] * s["m"] + (1 - betas[0]) * a, betas[1] * s["v"] + (1 - betas[1]) * a * a
            s["age"] = s["age"] + 1
            old = s["age"] if ages else float(t)
            u = (s["m"] / (1 - betas[0] ** old)) / (np.sqrt(s["v"] / (1 - betas[1] ** old)) + eps)
            weights[number] = weights[number] - lr * u @ bases[-1][kept[number]]
    return weights, bases
