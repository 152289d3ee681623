"""A linear layer whose matrix is 4-bit codes times float32 scales, multiplied tile by tile.

Legend: O outputs, I inputs, G = ceil(I / group) groups of a row, N rows of the input (tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 1 << 20
"""Largest number of matrix elements that exist in floating point at a time, or one row.

It is 4 MiB in float32: at 1,024 tokens the tiles of a 1536 x 576 layer then take 1.03 times as long as the product of
the same matrix in float32, and with 1 MiB 1.17 times.
"""


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with ``W[o, i] = scales[o, g] * (table[code[o, p]] - zeros[o, g]) + constants[o, g]``.

    p is the place of input i in a row (``order[p] == i``; p = i without an order), and ``g = p // group``. ``zeros``
    and ``constants`` count as 0 where they are absent. Each operation of the formula is rounded to float32 on its own,
    so no device has a reason to give other bits (tests run on the CPU). Equivalent to, but for the order of sums::

        y = torch.nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)

    Gradients are exact with respect to ``x`` and ``scales`` (for the latter set ``scales.requires_grad_()``) and come
    tile by tile as well. Not covered: gradients with respect to the bias or of second order, and adapters around it.
    Moving the module to another dtype leaves it as it is: scales lose too much in 16 bits. ``scales``, (O, G) float32,
    is the only parameter; it is frozen until somebody trains it.

    Attributes:
        codes: (O, ceil(I / 2)) uint8, as :func:`core.models.quant.packing.pack` makes them.
        table: (16,) float32, what a code stands for.
        zeros: (O, G) float32 or None.
        constants: (O, G) float32 or None.
        order: (I,) int32 or None.
        bias: (O,) or None.
        fixed: (O, G) bool, where a scale must never move; None where all may.
        pairs: (256, 2) float32, the two numbers that a byte stands for; made from the table.
        product: what multiplies where no gradient is asked for, if not the tiles (:mod:`core.models.quant.kernels`).
    """

    codes: Tensor
    table: Tensor
    zeros: Tensor | None
    constants: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    fixed: Tensor | None
    pairs: Tensor
    product: Callable[[Tensor, QuantLinear], Tensor] | None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        table: Tensor,
        *,
        in_features: int,
        group: int,
        scheme: str,
        zeros: Tensor | None = None,
        constants: Tensor | None = None,
        order: Tensor | None = None,
        bias: Tensor | None = None,
        fixed: Tensor | None = None,
    ) -> None:
        """Takes the parts as they are, without a copy.

        Args:
            codes: (O, ceil(I / 2)) uint8, packed.
            scales: (O, G) float32.
            table: (16,) float32.
            in_features: I.
            group: places of a row that share a scale; the last group of a row may be shorter. Even, unless it covers
                the whole row.
            scheme: how the codes were made, for instance ``int4``.
            zeros: (O, G) float32.
            constants: (O, G) float32.
            order: (I,) int32, a permutation of the inputs.
            bias: (O,).
            fixed: (O, G) bool; by default where a scale is 0.

        Raises:
            ValueError: if the parts do not fit together.
        """
        super().__init__()
        outputs, groups = codes.shape[0], -(-in_features // group)
        by_group = {"scales": scales, "zeros": zeros, "constants": constants, "fixed": fixed}
        wanted = {
            "codes": (codes, (outputs, (in_features + 1) // 2), torch.uint8),
            "table": (table, (16,), torch.float32),
            "order": (order, (in_features,), torch.int32),
            **{k: (v, (outputs, groups), torch.bool if k == "fixed" else torch.float32) for k, v in by_group.items()},
        }
        for name, (tensor, shape, dtype) in wanted.items():
            if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
                raise ValueError(f"the layer's {name} are {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
        if group % 2 and groups > 1:
            raise ValueError(f"a group of {group} is odd and does not cover the row of {in_features}")
        if (
            order is not None
            and not order.is_meta
            and not torch.equal(order.long().sort().values.cpu(), torch.arange(in_features))
        ):
            raise ValueError("the layer's order is no permutation of its inputs")
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"the layer's bias is {tuple(bias.shape)}, not ({outputs},)")
        self.in_features, self.out_features, self.group, self.scheme = in_features, outputs, group, scheme
        if fixed is None and not scales.is_meta and bool((scales == 0).any()):
            fixed = scales == 0
        self.product = None
        self.scales = nn.Parameter(scales, requires_grad=False)
        named = {"codes": codes, "table": table, "zeros": zeros, "constants": constants, "order": order}
        for name, tensor in {**named, "bias": bias, "fixed": fixed}.items():
            self.register_buffer(name, tensor)
        # A byte stands for two numbers: looking them up together is three times as fast as one after the other.
        self.register_buffer("pairs", torch.stack((table.repeat(16), table.repeat_interleave(16)), 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) of any float dtype to (..., O) of the same."""
        needed = torch.is_grad_enabled() and (x.requires_grad or self.scales.requires_grad)
        y = tiled(x, self) if self.product is None or needed else self.product(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantised(self) -> Tensor:
        """The whole matrix, (O, I) float32, columns in the order of the inputs; no gradient goes through it."""
        with torch.no_grad():
            whole = torch.empty(self.out_features, self.in_features, device=self.codes.device)
            for rows in self.tiles():
                whole[rows] = self.tile(rows, self.scales)
            if self.order is None:
                return whole
            return torch.empty_like(whole).index_copy_(1, self.order.long(), whole)

    def trainable_mask(self) -> Tensor:
        """(O, G) bool: where a scale may move."""
        return torch.ones_like(self.scales, dtype=torch.bool) if self.fixed is None else ~self.fixed

    def tiles(self) -> Iterator[slice]:
        """The rows of the matrix, in pieces of at most :data:`TILE` elements."""
        step = max(1, TILE // self.in_features)
        for first in range(0, self.out_features, step):
            yield slice(first, min(first + step, self.out_features))

    def levels(self, rows: slice) -> Tensor:
        """What the scales of some rows multiply: ``table[code] - zeros``.

        Args:
            rows: which, r of them.

        Returns:
            (r, G, group) float32 in the order of the places; what lies behind the end of a row is arbitrary.
        """
        count, groups = rows.stop - rows.start, self.scales.shape[1]
        packed = self.codes[rows]
        wide = (groups * self.group + 1) // 2  # the last group may be short, and the last byte half used
        if wide != packed.shape[1]:
            packed = nn.functional.pad(packed, (0, wide - packed.shape[1]))
        found = self.pairs.view(torch.int64).flatten().index_select(0, packed.flatten().int()).view(torch.float32)
        levels = found.view(count, -1)[:, : groups * self.group].reshape(count, groups, self.group)
        return levels if self.zeros is None else levels.sub_(self.zeros[rows].unsqueeze(2))

    def tile(self, rows: slice, scales: Tensor) -> Tensor:
        """Some rows of the matrix, columns in the order of the places.

        Args:
            rows: which, r of them.
            scales: (O, G) float32, those of the layer or others of the kind.

        Returns:
            (r, I) float32.
        """
        made = self.levels(rows).mul_(scales[rows].unsqueeze(2))
        if self.constants is not None:
            made.add_(self.constants[rows].unsqueeze(2))
        return made.flatten(1)[:, : self.in_features]

    def extra_repr(self) -> str:
        """Sizes and scheme, for ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}, group={self.group}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follows moves to another device, not to another dtype."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


def tiled(x: Tensor, layer: QuantLinear) -> Tensor:
    """The product alone, tile by tile: (..., I) of any float dtype to (..., O) of the same."""
    y: Tensor = _Product.apply(x, layer.scales, layer)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """``x W^T`` from tiles of W that live one at a time; the same for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, layer: QuantLinear) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.layer = layer
        flat = by_place(x, layer)
        y = torch.empty(flat.shape[0], layer.out_features, dtype=x.dtype, device=x.device)
        for rows in layer.tiles():
            torch.mm(flat, layer.tile(rows, scales).to(x.dtype).T, out=y[:, rows])
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scales = ctx.saved_tensors
        layer: QuantLinear = ctx.layer
        to_x, to_scales = ctx.needs_input_grad[:2]
        grad = grad.reshape(-1, layer.out_features)
        flat = by_place(x, layer) if to_scales else None
        grad_x = torch.zeros(grad.shape[0], layer.in_features, dtype=x.dtype, device=x.device) if to_x else None
        grad_scales = torch.empty_like(scales) if to_scales else None
        for rows in layer.tiles():
            if grad_x is not None:
                grad_x.addmm_(grad[:, rows], layer.tile(rows, scales).to(x.dtype))
            if grad_scales is not None and flat is not None:
                matrix = (grad[:, rows].T @ flat).float()
                levels = layer.levels(rows)
                if spare := levels.shape[1] * levels.shape[2] - layer.in_features:
                    matrix = nn.functional.pad(matrix, (0, spare))
                grad_scales[rows] = (matrix.view_as(levels) * levels).sum(2)
        if grad_x is not None:
            if layer.order is not None:
                grad_x = torch.empty_like(grad_x).index_copy_(1, layer.order.long(), grad_x)
            grad_x = grad_x.view_as(x)
        return grad_x, grad_scales, None


def by_place(x: Tensor, layer: QuantLinear) -> Tensor:
    """The rows of an input, its columns in the order of the places: (..., I) to (N, I)."""
    flat = x.reshape(-1, layer.in_features)
    return flat if layer.order is None else flat.index_select(1, layer.order)
