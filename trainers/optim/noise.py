"""The random directions of zeroth-order methods: each number is a function of where it stands, and of nothing else.

The number of element e of tensor t in step s, direction r, under a seed, comes from the Philox counter
(block of e, r, t, s) under the key (low word, high word of the seed). So it is the same in any order and any pieces, on
any device, on whichever process holds that element; nothing has to be stored to draw it again. A normal takes 16 bits
and is looked up in ``normal_quantiles``; a sign takes one bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.optim.estimator import Kind
from trainers.optim.philox import philox
from trainers.optim.quantiles import normal_quantiles

VERSION = "philox4x32-10/1"
"""Names the mapping from place to number; it changes when any number does."""

_PER_BLOCK = {"normal": 8, "rademacher": 128}
_BLOCKS = 1 << 14
_WORD = 1 << 32


def noise(
    seed: int,
    step: int,
    tensor: int,
    start: int,
    count: int,
    *,
    direction: int = 0,
    kind: Kind = "normal",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The random numbers of elements ``start`` to ``start + count - 1`` of one tensor.

    Args:
        seed: Of the run, in [0, 2**64).
        step: In [0, 2**32).
        tensor: Number of the tensor among those that are moved, in [0, 2**32).
        start: First element, in row-major order of the whole tensor, whichever part of it is here.
        count: How many elements; ``start + count`` may reach 2**35.
        direction: Number of the direction where a step has several: samples, or workers; in [0, 2**32).
        kind: ``normal``: by 16 bits each, from 65,536 values of variance 1; ``rademacher``: 1 or -1.
        device: Where they are made; the numbers do not depend on it.

    Returns:
        (count,) float32.
    """
    assert 0 <= seed < 1 << 64, "the seed is a 64-bit number"
    assert all(0 <= word < _WORD for word in (step, tensor, direction)), "places are 32-bit numbers"
    per_block = _PER_BLOCK[kind]
    first, last = start // per_block, -(-(start + count) // per_block)
    assert start >= 0 and last <= _WORD, "a tensor may have 2**35 elements at most"
    out = torch.empty((last - first) * per_block, dtype=torch.float32, device=device)
    for begin in range(first, last, _BLOCKS):
        end = min(last, begin + _BLOCKS)
        bits = _bits(seed, (begin, end, direction, tensor, step), device)
        part = out[(begin - first) * per_block : (end - first) * per_block]
        _to_normals(bits, part) if kind == "normal" else _to_signs(bits, part)
    return out[start - first * per_block :][:count]


def _bits(seed: int, place: tuple[int, int, int, int, int], device: torch.device | str) -> Tensor:
    """128 bits of each block from ``begin`` to ``end``, as (blocks, 4) int32."""
    begin, end, *rest = place
    blocks = torch.arange(begin, end, dtype=torch.int64, device=device)
    counters = (blocks, *(torch.full_like(blocks, word) for word in rest))
    words = philox(counters, (seed & (_WORD - 1), seed >> 32))  # type: ignore[arg-type]  # Four, counted above.
    return torch.stack([word.to(torch.int32) for word in words], dim=1)


def _to_normals(bits: Tensor, out: Tensor) -> None:
    """Low half of each word first, as every machine that torch runs on stores them."""
    halves = bits.view(torch.int16).flatten().to(torch.int32).bitwise_and_(0xFFFF)
    torch.index_select(normal_quantiles(str(out.device)), 0, halves, out=out)


def _to_signs(bits: Tensor, out: Tensor) -> None:
    """Bits of each word from the lowest; 0 is 1, and 1 is -1."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    ones = (bits.unsqueeze(-1) >> shifts).bitwise_and_(1)
    out.copy_(ones.flatten()).mul_(-2).add_(1)
