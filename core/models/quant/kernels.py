"""Which kernel multiplies: named tables of measurements, each a pure function of dtype, shape and device.

What torch offers on the CPU, measured at one thread of a Zen 4 with AVX-512 VNNI, layers of SmolLM2-135M, group 64,
1,024 tokens, as multiples of the time of ``reference``, the float32 tiles:

- ``reference``: 1.0; 1.03 times a product with the same matrix in float32.
- ``int8``, oneDNN's integer kernels with rows of x rounded to 8 bits: 0.44 (1536 x 576), 0.63 (576 x 1536),
  0.66 (576 x 576); 1.25 for 192 outputs. A forward pass of 16 x 64 tokens: 0.61.
- torch's packed int4 (``_weight_int4pack_mm_for_cpu``) is in no table. Its float32 form takes 65 times as long, and its
  bfloat16 form holds the scales in 8 bits of mantissa, in which a perturbation of 1e-3 vanishes.

``int8`` is not for every use: the rounding of x does not cancel between two losses. On SST-2 with SmolLM2 (8 rows of
32 tokens, 8 draws) the correlation of the difference quotient with the directional derivative was 0.21 at a
perturbation of 1e-3 of the median scale, 0.23 at 1e-2 and 0.99 at 5e-2; with ``reference`` 1.00 at
1e-2 and 0.98 at 5e-2 (not measured at 1e-3).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from core.models.quant import int8
from core.models.quant.linear import QuantLinear, tiled

Kernel = Literal["reference", "int8"]

EXACT, INT8 = "exact-1", "int8-1"
TABLES: Mapping[str, tuple[tuple[int, int, int], ...]] = MappingProxyType(
    {EXACT: (), INT8: ((128, 576, 16), (64, 1024, 1), (64, 576, 128), (32, 1024, 64), (32, 576, 1024))}
)
"""Name -> from which (group, outputs, tokens) on ``int8`` is taken: where all three of a row are reached. A change of a
table is a new name."""


def choose(table: str, *, device: str, dtype: torch.dtype, tokens: int, outputs: int, group: int) -> Kernel:
    """The kernel for one product.

    Args:
        table: a name in :data:`TABLES`.
        device: its type, for instance ``cpu``; others than that always get ``reference``.
        dtype: of the input; others than float32 always get ``reference``.
        tokens: rows of the input.
        outputs: of the layer.
        group: of the layer.

    Returns:
        The kernel's name.
    """
    if device != "cpu" or dtype != torch.float32:
        return "reference"
    reached = any(group >= row[0] and outputs >= row[1] and tokens >= row[2] for row in TABLES[table])
    return "int8" if reached else "reference"


def use(layers: Mapping[str, QuantLinear], table: str) -> int:
    """Lets layers multiply by a table wherever no gradient is asked for; ``exact-1`` takes them back to the tiles.

    Args:
        layers: by their full names.
        table: a name in :data:`TABLES`.

    Returns:
        For how many layers the table can choose another kernel than ``reference``; NF4's never.

    Raises:
        ValueError: if there is no such table, or it would change nothing.
    """
    if table not in TABLES:
        raise ValueError(f"there is no table of kernels {table!r:.80}; give {' or '.join(TABLES)}")
    fit = [layer for layer in layers.values() if int8.possible(layer)] if TABLES[table] else []
    if TABLES[table] and not fit:
        raise ValueError(f"{table} needs levels that are whole numbers: quantise with int4, or use {EXACT}")
    for layer in layers.values():
        layer.product = None
    for layer in fit:
        layer.product = _Chosen(table)
    return len(fit)


class _Chosen:
    """One layer's product by a table."""

    def __init__(self, table: str) -> None:
        self.table, self.packed = table, int8.Packed()

    def __call__(self, x: Tensor, layer: QuantLinear) -> Tensor:
        tokens = x.numel() // layer.in_features
        kind = choose(
            self.table,
            device=x.device.type,
            dtype=x.dtype,
            tokens=tokens,
            outputs=layer.out_features,
            group=layer.group,
        )
        return int8.product(x, layer, self.packed) if kind == "int8" else tiled(x, layer)
