"""Counter-based randomness: what is drawn depends on a key and a position alone, never on what was drawn before.

The same parameter at the same refresh gets the same subset on every rank, on every device and after a resume, and
nothing of it has to be stored or sent. Keys are mixed with splitmix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014), whose output is a bijection of its counter: no two positions ever tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_BITS = 16
_CHUNK = 1 << 18


def key(seed: int, *parts: int) -> int:
    """Mixes a seed and any whole numbers (a parameter's place, a refresh's number) into one key.

    Args:
        seed: Of the run, the same on every process.
        *parts: What the key is for; their order matters.

    Returns:
        A whole number in [0, 2**63).
    """
    state = _mix(seed & _MASK)
    for part in parts:
        state = _mix((state ^ _mix((part + _GAMMA) & _MASK)) & _MASK)
    return state >> 1


def noise(start: int, stop: int, key: int) -> Tensor:
    """The numbers of positions ``start`` to ``stop - 1`` under a key.

    Args:
        start: First position.
        stop: Position after the last.
        key: From ``key``.

    Returns:
        (stop - start,) int64 on the CPU, uniform over all 64 bits and all different.
    """
    first = _signed(key + (start + 1) * _GAMMA)
    mixed = torch.arange(stop - start, dtype=torch.int64, device="cpu").mul_(_signed(_GAMMA)).add_(first)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # A shift of a signed number drags its sign along; the mask takes it off again.
        mixed.bitwise_xor_((mixed >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            mixed.mul_(_signed(factor))
    return mixed


def permutation(n: int, key: int) -> Tensor:
    """A random order of ``range(n)``.

    Args:
        n: How many.
        key: From ``key``.

    Returns:
        (n,) int64 on the CPU.
    """
    return noise(0, n, key).argsort()


def subset(n: int, k: int, key: int) -> Tensor:
    """The first ``k`` of ``permutation(n, key)``, in ascending order: reading memory in order is what makes it fast.

    Args:
        n: Out of how many.
        k: How many, at most ``n``.
        key: From ``key``.

    Returns:
        (k,) int64 on the CPU, ascending.
    """
    return permutation(n, key)[:k].sort().values


def threshold(n: int, k: int, key: int) -> int:
    """The number that exactly ``k`` of ``n`` positions lie below, so that ``subset`` needs no list.

    Two passes over the positions in chunks; takes half a megabyte whatever ``n`` is.

    Args:
        n: Out of how many.
        k: How many, at most ``n``.
        key: From ``key``.

    Returns:
        A bound: position i belongs to ``subset(n, k, key)`` if and only if ``noise(i, i + 1, key) < bound``; a bound
        of 2**63 takes all.
    """
    if k >= n:
        return 1 << 63
    counts = torch.zeros(1 << _BITS, dtype=torch.int64, device="cpu")
    for start in range(0, n, _CHUNK):
        high = (noise(start, min(n, start + _CHUNK), key) >> (64 - _BITS)) + (1 << (_BITS - 1))
        counts += torch.bincount(high, minlength=1 << _BITS)
    below = counts.cumsum(0)
    place = int(torch.searchsorted(below, torch.tensor(k, dtype=torch.int64, device="cpu"), right=True))
    before = int(below[place - 1]) if place else 0
    within = []
    for start in range(0, n, _CHUNK):
        mixed = noise(start, min(n, start + _CHUNK), key)
        within.append(mixed[(mixed >> (64 - _BITS)) + (1 << (_BITS - 1)) == place])
    return int(torch.cat(within).sort().values[k - before])


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of torch's own, seeded with a key, for draws in bulk.

    Args:
        key: From ``key``.
        device: Where it draws; the numbers differ between kinds of device.

    Returns:
        A fresh generator.
    """
    return torch.Generator(device=device).manual_seed(key)


def _mix(counter: int) -> int:
    mixed = (counter + _GAMMA) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
    return mixed ^ (mixed >> 31)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
