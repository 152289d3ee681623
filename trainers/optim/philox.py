"""Philox4x32-10: 128 random bits for each counter, in plain integer arithmetic that is the same on every device.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A
counter of four 32-bit words is put through ten rounds of two multiplications each, under a key of two words; there is
no state, so any part of a stream can be made alone. torch has no unsigned 64-bit multiplication, but the product of two
32-bit numbers fits the 64 bits of an int64, sign and all: its halves are read by shifting and masking.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counters: Words c0 to c3 of N counters, each (N,) int64 in [0, 2**32); they are overwritten.
        key: Two words in [0, 2**32).

    Returns:
        Four words, each (N,) int64 in [0, 2**32).
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key
    high = torch.empty_like(c0)
    for number in range(ROUNDS):
        if number:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        # c0, c2 hold words; c1, c3 may hold products whose high half is masked off after the exclusive or.
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        torch.bitwise_right_shift(c2, 32, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(c0, 32, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_MASK)
        c0, c1, c2, c3 = c1, c2, c3, c0
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)
