"""From a matrix of floats to 4-bit codes: int4 with symmetric groups, or NF4."""

from __future__ import annotations

import torch
from torch import Tensor

from core.models.quant.linear import QuantLinear
from core.models.quant.packing import pack

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 levels of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E)."""

SCHEMES = ("int4", "nf4")
GROUPS = (32, 64, 128)
"""Sizes that a group may have; NF4 has 64 alone."""

TILE = 1 << 16
"""Elements that are quantised at a time: what passes stays small beside what stays."""


def quantise(weight: Tensor, scheme: str, group: int = 64, bias: Tensor | None = None) -> QuantLinear:
    """Quantises one matrix, to the nearest level, group by group along each row.

    ``int4``: ``scale = max|w| / 7.5`` and ``code = clamp(round(w / scale) + 8, 0, 15)``, which stands for ``code - 8``
    (GPTQ's symmetric grid). ``nf4``: ``scale = max|w|``, and the code of the nearest of the 16 levels of ``w / scale``.
    Rounding is to nearest, ties to even (int4) or to the lower level (nf4). A group of zeros gets a scale of 0, which
    is fixed. Groups never straddle rows; bitsandbytes' do where the row is no multiple of 64.

    Args:
        weight: (O, I) of any float dtype.
        scheme: ``int4`` or ``nf4``.
        group: 32, 64 or 128; 64 for ``nf4``. The last group of a row may be shorter.
        bias: (O,), kept as it is.

    Returns:
        The layer, on the matrix's device; on ``meta`` it has shapes alone.

    Raises:
        ValueError: if the scheme or the group is unknown, or the matrix is not finite.
    """
    check(scheme, group)
    outputs, inputs = weight.shape
    table = (torch.arange(-8.0, 8.0) if scheme == "int4" else torch.tensor(NF4)).to(weight.device)
    codes = torch.empty(outputs, (inputs + 1) // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(outputs, -(-inputs // group), device=weight.device)
    step = max(1, TILE // inputs)
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        codes[rows], scales[rows] = _rows(weight.detach()[rows].float(), scheme, group, table)
    return QuantLinear(codes, scales, table, in_features=inputs, group=group, scheme=scheme, bias=bias)


def _rows(wide: Tensor, scheme: str, group: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of some rows."""
    if not wide.is_meta and not bool(torch.isfinite(wide).all()):
        raise ValueError("a matrix that is not finite cannot be quantised; look for nan or inf in the model's weights")
    count, inputs = wide.shape
    groups = -(-inputs // group)
    grouped = torch.nn.functional.pad(wide, (0, groups * group - inputs)).view(count, groups, group)
    largest = grouped.abs().amax(2)
    scales = largest / 7.5 if scheme == "int4" else largest
    ratio = grouped / torch.where(scales == 0, 1, scales).unsqueeze(2)
    if scheme == "int4":
        codes = ratio.round_().add_(8).clamp_(0, 15).to(torch.uint8)
    else:
        middles = ((table[:-1].double() + table[1:].double()) / 2).float()
        codes = torch.bucketize(ratio, middles).to(torch.uint8)
    return pack(codes.flatten(1)[:, :inputs]), scales


def check(scheme: str, group: int) -> None:
    """Refuses schemes and groups that there are not.

    Args:
        scheme: how to quantise.
        group: places that share a scale.

    Raises:
        ValueError: if one is unknown; the message lists the known ones.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r:.80}; give {' or '.join(SCHEMES)}")
    if group not in (GROUPS if scheme == "int4" else (64,)):
        raise ValueError(f"{scheme} has no groups of {group!r:.80}; give {'32, 64 or 128' if scheme == 'int4' else 64}")
