"""The product with activations of 8 bits: oneDNN's integer kernels, one call for each group of a row.

Each row of x is rounded to ``u = round(x / r) + 128`` with ``r = max|x| / 127``, codes become signed bytes, and::

    y[n, o] = r[n] * sum over g of ( scales[o, g] * sum over p in g of (u[n, p] - 128) * level[o, p] )

The inner sum is exact in int32 and takes the float32 scales as they are, so a change of a scale by one part in a
million counts; what is lost is the rounding of x, about 0.8 % of a product's norm. ``zeros`` and ``constants`` come in
as one float32 product of the rounded x's sums over groups. The codes are kept once more, a byte each. Not covered:
tables that are not 16 consecutive whole numbers (NF4), gradients, devices other than the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.models.quant.linear import QuantLinear, by_place
from core.models.quant.packing import unpack

_ROWS = 64
"""Rows of x that are rounded at a time: what is written is read again while it is in the cache."""


class Packed:
    """A layer's codes in oneDNN's own layout: a byte each, beside the four bits that the layer keeps.

    They are made on first use, belong to no state dict, and are made again for a copy of the layer and for other codes.
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._groups: list[Tensor] = []
        self._of: tuple[int, int] | None = None

    def groups(self, layer: QuantLinear) -> list[Tensor]:
        """One packed matrix for each group: codes less 8, so that they are signed."""
        key = (layer.codes.data_ptr(), layer.codes._version)
        if self._of != key:
            self._of = key
            codes = unpack(layer.codes, layer.in_features).to(torch.int8) - 8
            pieces = torch.split(codes, layer.group, dim=1)
            prepack = torch.ops.onednn.qlinear_prepack
            self._groups = [prepack(piece.contiguous(), None) for piece in pieces]
        return self._groups

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()


def possible(layer: QuantLinear) -> bool:
    """Whether a layer's levels are 16 consecutive whole numbers, as integer arithmetic needs them."""
    return torch.equal(layer.table - layer.table[0], torch.arange(16.0, device=layer.table.device))


def product(x: Tensor, layer: QuantLinear, packed: Packed) -> Tensor:
    """``x W^T`` with x rounded to 8 bits.

    Args:
        x: (..., I) of any float dtype, on the CPU. A row that is not finite gives one that is not.
        layer: one that :func:`possible` accepts.
        packed: its codes.

    Returns:
        (..., O) in x's dtype.
    """
    flat = by_place(x, layer).float()
    low, high = flat.aminmax(dim=1, keepdim=True)
    step = torch.maximum(-low, high).div_(127)
    divisor = step.clamp_min(torch.finfo(torch.float32).tiny)
    rounded = torch.empty(flat.shape, dtype=torch.uint8)
    for rows in range(0, flat.shape[0], _ROWS):
        part = slice(rows, rows + _ROWS)
        rounded[part] = (flat[part] / divisor[part]).round_().add_(128)
    pieces = torch.split(rounded, layer.group, dim=1)
    y = _offsets(pieces, layer)
    if y is None:
        y = torch.zeros(flat.shape[0], layer.out_features)
    scales, zero_points = layer.scales.detach().T.contiguous(), torch.zeros(layer.out_features, dtype=torch.int64)
    for g, (piece, codes) in enumerate(zip(pieces, packed.groups(layer), strict=True)):
        args = (piece.contiguous(), 1.0, 128, codes, scales[g], zero_points, y, None, 1.0, 0, torch.float32, 1.0, 0)
        torch.ops.onednn.qlinear_pointwise.binary(*args, "sum", 1.0, "none", [], "")  # adds to y
    return y.mul_(step).to(x.dtype).view(*x.shape[:-1], layer.out_features)


def _offsets(pieces: tuple[Tensor, ...], layer: QuantLinear) -> Tensor | None:
    """What the levels' distance from ``code - 8``, the zeros and the constants add to y, before the factor r."""
    shift = layer.table[0] + 8
    if layer.zeros is None and layer.constants is None and shift == 0:
        return None
    each = layer.scales * (shift if layer.zeros is None else shift - layer.zeros)
    if layer.constants is not None:
        each = each + layer.constants
    sums = torch.stack([piece.sum(1, dtype=torch.int32) - 128 * piece.shape[1] for piece in pieces], dim=1)
    return sums.float() @ each.detach().T
