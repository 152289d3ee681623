"""The normal distribution as 65,536 numbers: 16 random bits become one normal by looking it up.

Logarithms and cosines, of which the usual transforms are made, differ in their last bits between devices and libraries;
a table does not. It is made of additions, multiplications, divisions and no other function, all in float64, where every
machine rounds them alike.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SIZE = 1 << 16
_ROOT_TWO_PI = 2.5066282746310002
_NEWTON = 24
_TERMS = 72
_HALVINGS = 5
_EXPONENTIAL_TERMS = 14


@cache
def normal_quantiles(device: str = "cpu") -> Tensor:
    """The quantiles of the standard normal distribution at (k + 1/2) / 65,536, for k from 0 to 65,535.

    Equal to ``[statistics.NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(65536)]``, rounded to float32. Mean
    and skewness are 0, the variance is 0.99998, the kurtosis 2.9992, and no number is beyond 4.3250.

    Args:
        device: Where it is to lie; it is always made on the CPU.

    Returns:
        (65536,) float32, ascending and odd: entry 65,535 - k is entry k with the other sign. Shared; not to be written
        to.
    """
    if device != "cpu":
        return normal_quantiles().to(device)
    # p - 1/2 of the upper half; exact, since all are multiples of 2**-17.
    above = (torch.arange(SIZE // 2, dtype=torch.float64, device="cpu") + 0.5) / SIZE
    target = above * _ROOT_TWO_PI
    x = torch.zeros_like(above)
    for _ in range(_NEWTON):
        # The distribution is concave above its median, so that Newton's method from 0 comes up to the root from below.
        x = x - (_series(x) - target * _exponential(x * x * 0.5))
    upper = x.float()
    return torch.cat([-upper.flip(0), upper])


def _series(x: Tensor) -> Tensor:
    """(Phi(x) - 1/2) / phi(x) = x + x^3 / 3 + x^5 / (3 5) + ..., for 0 <= x < 4.4."""
    square = x * x
    term, total = x, x
    for k in range(1, _TERMS):
        term = term * square / (2 * k + 1)
        total = total + term
    return total


def _exponential(y: Tensor) -> Tensor:
    """e^y by its series at y / 32, squared five times, for 0 <= y < 10."""
    small = y / (1 << _HALVINGS)
    term = torch.ones_like(y)
    total = term
    for k in range(1, _EXPONENTIAL_TERMS + 1):
        term = term * small / k
        total = total + term
    for _ in range(_HALVINGS):
        total = total * total
    return total
