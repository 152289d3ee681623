"""4-bit matrices from their definition, in float64 NumPy: one code after another, nothing packed, nothing tiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def matrix(parts: dict[str, Any], inputs: int, group: int) -> tuple[Array, Array, list[int]]:
    """The matrix that a layer's parts stand for.

    Args:
        parts: codes (O, ceil(I / 2)) packed, table, scales, and perhaps zeros, constants, order, as NumPy arrays.
        inputs: I.
        group: places per scale.

    Returns:
        (O, I) matrix; (O, I) derivative of each entry by its scale; the group of each input.
    """
    outputs = parts["codes"].shape[0]
    weights, levels = np.zeros((outputs, inputs)), np.zeros((outputs, inputs))
    owner = [0] * inputs
    for o in range(outputs):
        for place in range(inputs):
            byte = int(parts["codes"][o, place // 2])
            code = byte % 16 if place % 2 == 0 else byte // 16
            g = place // group
            i = place if parts.get("order") is None else int(parts["order"][place])
            zero = 0.0 if parts.get("zeros") is None else float(parts["zeros"][o, g])
            constant = 0.0 if parts.get("constants") is None else float(parts["constants"][o, g])
            levels[o, i] = float(parts["table"][code]) - zero
            weights[o, i] = float(parts["scales"][o, g]) * levels[o, i] + constant
            owner[i] = g
    return weights, levels, owner


def gradients(x: Array, grad: Array, weights: Array, levels: Array, owner: list[int]) -> tuple[Array, Array]:
    """Gradients of ``sum(grad * (x W^T))``.

    Args:
        x: (N, I).
        grad: (N, O).
        weights: (O, I).
        levels: (O, I), from :func:`matrix`.
        owner: the group of each input.

    Returns:
        (N, I) by x and (O, G) by the scales.
    """
    by_weight = np.einsum("no,ni->oi", grad, x)
    by_scale = np.zeros((weights.shape[0], max(owner) + 1))
    for i, g in enumerate(owner):
        by_scale[:, g] += by_weight[:, i] * levels[:, i]
    return np.einsum("no,oi->ni", grad, weights), by_scale


def int4(weights: Array, group: int) -> tuple[Array, Array, Array]:
    """Codes and scales of the symmetric 4-bit grid.

    Args:
        weights: (O, I).
        group: inputs per scale.

    Returns:
        (O, I) codes, (O, G) scales, and (O, I) how far each value is from the middle between two codes, in scales.
    """
    outputs, inputs = weights.shape
    codes, slack = np.full((outputs, inputs), 8.0), np.full((outputs, inputs), 0.5)
    scales = np.zeros((outputs, -(-inputs // group)))
    for o in range(outputs):
        for g in range(scales.shape[1]):
            part = weights[o, g * group : (g + 1) * group]
            scales[o, g] = np.abs(part).max() / 7.5
            if scales[o, g] == 0:
                continue
            ratio = part / scales[o, g]
            codes[o, g * group : g * group + part.size] = np.minimum(np.rint(ratio) + 8, 15)
            slack[o, g * group : g * group + part.size] = np.abs(ratio - np.floor(ratio) - 0.5)
    return codes, scales, slack


def nearest(weights: Array, group: int, levels: Array) -> tuple[Array, Array, Array]:
    """Codes and scales of a table of levels, scaled by the largest magnitude of a group.

    Args:
        weights: (O, I).
        group: inputs per scale.
        levels: (16,).

    Returns:
        (O, I) codes, (O, G) scales, and (O, I) by how much the nearest level is nearer than the second.
    """
    outputs, inputs = weights.shape
    codes, slack = np.zeros((outputs, inputs)), np.zeros((outputs, inputs))
    scales = np.zeros((outputs, -(-inputs // group)))
    for o in range(outputs):
        for i in range(inputs):
            g = i // group
            scales[o, g] = np.abs(weights[o, g * group : (g + 1) * group]).max()
            distances = np.abs(weights[o, i] / (scales[o, g] or 1.0) - levels)
            codes[o, i] = distances.argmin()
            first, second = np.sort(distances)[:2]
            slack[o, i] = second - first
    return codes, scales, slack
