"""Two 4-bit codes to a byte: the first of a pair in the low half."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """Packs codes; a row of odd length is filled with a code 0 that nobody reads.

    Args:
        codes: (rows, n) uint8, each below 16.

    Returns:
        (rows, ceil(n / 2)) uint8: byte j holds code 2 j in bits 0-3 and code 2 j + 1 in bits 4-7.
    """
    assert codes.dtype == torch.uint8 and codes.ndim == 2
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The codes of :func:`pack`.

    Args:
        packed: (rows, ceil(n / 2)) uint8.
        n: codes in a row.

    Returns:
        (rows, n) uint8, each below 16.
    """
    assert packed.dtype == torch.uint8 and packed.shape[1] == (n + 1) // 2
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :n]
