"""FRUGAL from its formulas, in float64 NumPy, one matrix at a time.

What has state is a dense mask here, and moments are dense arrays that are zero outside it: nothing is gathered, cut
into tiles or fused. Random choices are given; the singular vectors are worked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class Settings:
    """The numbers of a run."""

    lr: float = 1e-3
    lr_scale: float = 1.0
    free_lr_scale: float = 1.0
    weight_decay: float = 0.0
    full: str = "adamw"
    free: str = "sign"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    state: str = "reset"


def rule(s: Settings, g: Array, m: Array, v: Array, age: Array, rate: float) -> tuple[Array, Array, Array]:
    """One update of the rule with state: (update, new first moment, new second moment), all elementwise."""
    if s.full == "lion":
        return -rate * np.sign(s.beta1 * m + (1 - s.beta1) * g), s.beta2 * m + (1 - s.beta2) * g, v
    if s.full == "sgdm":
        m = s.momentum * m + g
        return -rate * m, m, v
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * g**2
    m_hat, root = m / (1 - s.beta1**age), np.sqrt(v) / np.sqrt(1 - s.beta2**age)
    return -rate * m_hat / (root + s.eps), m, v


def free_update(s: Settings, residual: Array) -> Array:
    """The update without state."""
    rate = s.lr * s.lr_scale * s.free_lr_scale
    return {"sign": -rate * np.sign(residual), "sgd": -rate * residual, "none": 0 * residual}[s.free]


def coordinates(w: Array, gradients: Sequence[Array], masks: dict[int, Mask], s: Settings) -> Array:
    """Splits by coordinates, and blocks: a mask of a whole parameter is all true or all false.

    Args:
        w: Weights of any shape.
        gradients: One a step.
        masks: What has state from a step on, by the number of the step, from 1.
        s: Settings.

    Returns:
        Weights after the last step.
    """
    w = w.copy()
    m, v, age = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    mask = np.zeros(w.shape, dtype=bool)
    for step, g in enumerate(gradients, start=1):
        if step in masks:
            new = masks[step]
            if s.state == "reset":
                m, v, age = 0 * m, 0 * v, 0 * age
            elif s.state == "keep" and step > 1:
                for moment in (m, v):
                    held = moment[mask]
                    moment[:] = 0
                    moment[new] = held
            elif s.state == "project":
                m, v = np.where(mask & new, m, 0), np.where(mask & new, v, 0)
            elif s.state == "carry":
                m, v = np.where(mask & new, m, 0), np.where(mask & new, v, 0)
                age = np.where(mask & new, age, 0)
            mask = new
        age = age + 1
        u, m_new, v_new = rule(s, g, m, v, age, s.lr * s.lr_scale)
        m, v = np.where(mask, m_new, 0), np.where(mask, v_new, 0)
        w = w * (1 - s.lr * s.weight_decay) + np.where(mask, u, free_update(s, g))
    return w


def projections(
    w: Array, gradients: Sequence[Array], bases: dict[int, tuple[Array, Array]], s: Settings
) -> tuple[Array, Mask]:
    """Splits by a subspace.

    Args:
        w: Weights (m, n).
        gradients: One a step.
        bases: From a step on, (A, B): A (m, a) and B (b, n), the identity on a side that is not projected.
        s: Settings.

    Returns:
        Weights after the last step, and where they are certain: where no residual was so small (a millionth of its
        largest entry, or of the gradient's) that its sign is one of rounding.
    """
    w = w.copy()
    left, right = np.eye(w.shape[0]), np.eye(w.shape[1])
    low = np.zeros(0)
    certain = np.ones(w.shape, dtype=bool)
    m, v, age = low, low, 0
    for step, g in enumerate(gradients, start=1):
        if step in bases:
            before_left, before_right = left, right
            left, right = bases[step]
            size = (left.shape[1], right.shape[0])
            if s.state == "reset" or step == 1:
                m, v, age = np.zeros(size), np.zeros(size), 0
            elif s.state == "project":
                p, q = left.T @ before_left, before_right @ right.T
                m, v = p @ m @ q, p**2 @ v @ q**2
        age += 1
        low = left.T @ g @ right.T
        u, m, v = rule(s, low, m, v, np.full(low.shape, float(age)), s.lr * s.lr_scale)
        residual = g - left @ low @ right
        certain &= np.abs(residual) > 1e-6 * np.abs(residual).max()
        certain &= np.abs(residual).max() > 1e-9 * np.abs(g).max()
        w = w * (1 - s.lr * s.weight_decay) + left @ u @ right + free_update(s, residual)
    return w, certain


def leading(g: Array, side: str, rank: int) -> tuple[Array, Array]:
    """(A, B) of the leading singular vectors, each with its largest entry positive."""
    u, _, vh = np.linalg.svd(g, full_matrices=False)
    u, vh = u[:, :rank], vh[:rank]
    u = u * np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    vh = vh * np.sign(vh[np.arange(vh.shape[0]), np.abs(vh).argmax(1)])[:, None]
    return (
        np.eye(g.shape[0]) if side == "right" else u,
        np.eye(g.shape[1]) if side == "left" else vh,
    )


def top_mask(gradients: Sequence[Array], step: int, k: int, axis: int, memory: float) -> Mask:
    """The k columns (axis 1) or rows (axis 0) with the largest running mean of squared norms up to a step."""
    score = (gradients[0] ** 2).sum(1 - axis)
    for g in gradients[1:step]:
        score = memory * score + (1 - memory) * (g**2).sum(1 - axis)
    mask = np.zeros(gradients[0].shape, dtype=bool)
    for line in np.argsort(-score, kind="stable")[:k]:
        mask[(slice(None), line) if axis == 1 else (line, slice(None))] = True
    return mask
