"""What the tests of the optimizers share: fixed gradients, and runs over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = [(12, 20), (20, 12), (4, 24), (9, 9)]
"""Rows < columns, rows > columns, the key projection of grouped queries, and odd squares."""


def problem(shape: Sequence[int], steps: int, seed: int = 0) -> tuple[Any, list[Any]]:
    """Weights and gradients as float64 arrays; rows and columns differ in size, and drift; some entries are zero."""
    draw = np.random.default_rng(seed)
    drift = [np.cumsum(0.3 * draw.normal(size=(steps, size)), axis=0) for size in (shape[0], shape[-1])]
    first = (slice(None), *[None] * (len(shape) - 1))
    gradients = [draw.normal(size=shape) * np.exp(drift[0][i][first] + drift[1][i]) for i in range(steps)]
    for gradient in gradients:
        gradient[draw.random(shape) < 0.05] = 0
    return 0.1 * draw.normal(size=shape), gradients


def run(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    start: Sequence[Any],
    gradients: Sequence[Sequence[Any]],
    *,
    dtype: torch.dtype = torch.float64,
    each: Callable[[int, torch.optim.Optimizer, list[Tensor]], None] | None = None,
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Steps some parameters through given gradients.

    Args:
        make: Parameters to optimizer.
        start: Weights, one array a parameter.
        gradients: For each step one array a parameter; None where it has no gradient.
        dtype: Of the parameters.
        each: Called after each step with its number, from 1.

    Returns:
        The parameters and the optimizer.
    """
    parameters = [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in start]
    optimizer = make(list(parameters))
    for number, row in enumerate(gradients, start=1):
        give(parameters, row)
        optimizer.step()
        if each is not None:
            each(number, optimizer, list(parameters))
    return list(parameters), optimizer


def give(parameters: Sequence[Tensor], row: Sequence[Any]) -> None:
    """Sets gradients."""
    for parameter, gradient in zip(parameters, row, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=parameter.dtype)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
