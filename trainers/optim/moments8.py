"""Moments in eight bits: blocks of 256 numbers with one float32 scale each, rounded up or down at random.

The mean of the gradient is a signed code of -127 to 127 over the block's largest magnitude. The mean square is stored
as its root, a code of 0 to 255: squares span twice the decades of roots. Rounding at random keeps the expectation, so
that a mean square decaying by a thousandth a step does decay although a code is four thousandths wide. A square that is
not zero never becomes zero, which would divide an update by ``eps``.

Takes one byte a number and 4/256 for the scale: for two moments 2 + 8/256 bytes a weight with state instead of 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256
ROOT = "exp_avg_sq"
"""The moment that is stored as its root."""


def blank(name: str, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of zeros.

    Args:
        name: Of the moment.
        shape: Of the moment.
        device: Where it lives.

    Returns:
        Codes of that shape, uint8 for the mean square and int8 for others; scales (blocks,) float32.
    """
    codes = torch.zeros(shape, dtype=torch.uint8 if name == ROOT else torch.int8, device=device)
    return codes, torch.zeros(math.ceil(codes.numel() / BLOCK), device=device)


def encode(name: str, value: Tensor, codes: Tensor, scales: Tensor, generator: torch.Generator | None) -> None:
    """Writes a moment into its codes.

    Args:
        name: Of the moment.
        value: float32, of the codes' shape.
        codes: Overwritten.
        scales: Overwritten.
        generator: Draws what decides on rounding up; None rounds to nearest.
    """
    blocks = _blocks(value.sqrt() if name == ROOT else value)
    top = 255 if name == ROOT else 127
    largest = blocks.abs().amax(1)
    scales.copy_(largest / top)
    scaled = blocks / torch.where(largest > 0, scales, 1).unsqueeze(1)
    if generator is None:
        rounded = scaled.round()
    else:
        rounded = torch.rand(scaled.shape, generator=generator, device=value.device).add_(scaled).floor_()
    if name == ROOT:
        rounded = torch.where(blocks > 0, rounded.clamp_min(1), rounded)
    codes.copy_(rounded.clamp_(-top, top).view(-1)[: value.numel()].view(value.shape))


def decode(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    """Reads a moment.

    Args:
        name: Of the moment.
        codes: From ``encode``.
        scales: From ``encode``.

    Returns:
        float32, of the codes' shape.
    """
    value = (_blocks(codes.float()) * scales.unsqueeze(1)).view(-1)[: codes.numel()].view(codes.shape)
    return value.square() if name == ROOT else value


def _blocks(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
