"""Gradients and loops that the tests of the projected optimizers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 14
# Sizes for which no basis vector has a zero: an antisymmetric row with one falls on the half between two codes.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (12, 20),
    "tall": (20, 12),
    "gqa": (8, 24),
    "square": (16, 16),
    "vector": (10,),
    "experts": (3, 11, 8),
    "convolution": (10, 3, 2, 2),
}


def gradients(shape: Sequence[int], *, seed: int = 0, steps: int = STEPS) -> list[Tensor]:
    """A drifting low-rank signal with noise, so that the choice changes, but not every time."""
    draw = torch.Generator().manual_seed(seed + sum(shape))
    base = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return [
        base * (0.7**step) + torch.randn(*shape, generator=draw, dtype=torch.float64) * 0.3 + base.roll(step, -1) * 0.5
        for step in range(steps)
    ]


def start(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """Weights to start from."""
    draw = torch.Generator().manual_seed(99)
    return nn.Parameter((0.1 * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype))


def follow(optimizer: torch.optim.Optimizer, steps: Sequence[dict[nn.Parameter, Tensor | None]]) -> None:
    """Takes one step for each set of gradients."""
    for grads in steps:
        for parameter, gradient in grads.items():
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype).clone()
        optimizer.step()


def matrices(tensor: Tensor) -> list[Tensor]:
    """The matrices of a parameter of any shape."""
    if tensor.dim() == 3:
        return list(tensor)
    return [tensor.reshape(tensor.shape[0], -1)]


def nbytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state."""
    states: Any = optimizer.state.values()
    return sum(v.numel() * v.element_size() for state in states for v in state.values() if isinstance(v, Tensor))
