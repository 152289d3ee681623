"""Philox4x32-10 against the vectors that its authors published, and against its definition in whole numbers."""

from __future__ import annotations

import random

import pytest
import torch

from trainers.optim.philox import philox

ONES = 0xFFFFFFFF
# The known answers of the authors' library, Random123 (philox4x32, 10 rounds): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """One block, in Python's whole numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & ONES, (left >> 32) ^ c3 ^ k1, left & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def _run(counters: list[tuple[int, ...]], key: tuple[int, int]) -> list[tuple[int, ...]]:
    words = philox(tuple(torch.tensor(word) for word in zip(*counters, strict=True)), key)
    return list(zip(*(word.tolist() for word in words), strict=True))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert _run([counter], key) == [expected]
    assert plain(counter, key) == expected


def test_many_counters_at_once_are_each_their_own() -> None:
    draw = random.Random(0)
    counters = [tuple(draw.getrandbits(32) for _ in range(4)) for _ in range(500)]
    key = (draw.getrandbits(32), draw.getrandbits(32))
    assert _run(counters, key) == [plain(counter, key) for counter in counters]
