"""The median size of many numbers, exactly, without a sorted copy of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_HALF = 16
_CHUNK = 1 << 20


def median_size(tensors: Iterable[Tensor]) -> float:
    """The median of the absolute values of all elements that are not zero; of an even number, the lower one.

    Equal to ``torch.cat([t.flatten() for t in tensors]).float().abs()``, zeros left out, ``.median()``. Positive
    float32 numbers are ordered as their bits are, so two passes suffice: one counts the high halves, one the low halves
    of those numbers that share the median's high half. Takes a few megabytes whatever the size is.

    Args:
        tensors: Any shapes and floating dtypes; compared as float32.

    Returns:
        The median.

    Raises:
        ValueError: All elements are zero, or there are none.
    """
    flats = [tensor.detach().reshape(-1) for tensor in tensors]
    chunks = [flat[start : start + _CHUNK] for flat in flats for start in range(0, flat.numel(), _CHUNK)]
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for part in chunks:
        counts += torch.bincount(_bits(part) >> _HALF, minlength=1 << _HALF).cpu()
    total = int(counts.sum())
    if not total:
        raise ValueError("every number is zero, so that there is no size to be relative to: give eps")
    high, left = _find(counts, (total - 1) // 2)
    counts.zero_()
    for part in chunks:
        bits = _bits(part)
        low = bits[bits >> _HALF == high] & ((1 << _HALF) - 1)
        counts += torch.bincount(low, minlength=1 << _HALF).cpu()
    low_half, _ = _find(counts, left)
    found = torch.tensor((high << _HALF) + low_half, dtype=torch.int32)
    return float(found.view(torch.float32))


def _bits(part: Tensor) -> Tensor:
    size = part.float().abs()
    return size[size != 0].view(torch.int32).long()


def _find(counts: Tensor, rank: int) -> tuple[int, int]:
    """Which bucket the element of that rank lies in, and its rank among those of the bucket."""
    below = counts.cumsum(0)
    place = int(torch.searchsorted(below, torch.tensor(rank), right=True))
    return place, rank - (int(below[place - 1]) if place else 0)
