"""The noise is a function of its place alone, and looks like noise: stated tests, stated p, fixed seeds.

A test of P hypotheses that together may fail by chance with probability p compares each statistic, scaled to a standard
normal, with the quantile at 1 - p / (2 P).
"""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.trainers.optim.test_philox import plain
from trainers.optim.noise import noise
from trainers.optim.quantiles import normal_quantiles

P = 1e-4
MANY = 1 << 21


def _bound(hypotheses: int) -> float:
    return NormalDist().inv_cdf(1 - P / (2 * hypotheses))


def _reference(seed: int, step: int, tensor: int, element: int, *, direction: int, kind: str) -> float:
    """One number by the definition, in whole numbers and the standard library's quantile."""
    per_block, width = (8, 16) if kind == "normal" else (128, 1)
    block, place = divmod(element, per_block)
    words = plain((block, direction, tensor, step), (seed & 0xFFFFFFFF, seed >> 32))
    word, part = divmod(place, 32 // width)
    bits = words[word] >> (part * width) & ((1 << width) - 1)
    exact = NormalDist().inv_cdf((bits + 0.5) / 65536) if kind == "normal" else 1 - 2 * bits
    return float(torch.tensor(exact, dtype=torch.float64).float())


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_every_number_is_that_of_its_place(kind: Any) -> None:
    draw = random.Random(1)
    for _ in range(60):
        seed, step, tensor, direction = (draw.getrandbits(bits) for bits in (64, 32, 32, 32))
        start = draw.choice((0, draw.randrange(300), draw.randrange(1 << 34)))
        found = noise(seed, step, tensor, start, 5, direction=direction, kind=kind)
        assert found.dtype == torch.float32
        expected = [_reference(seed, step, tensor, start + i, direction=direction, kind=kind) for i in range(5)]
        assert found.tolist() == expected


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_pieces_of_any_size_are_the_whole(kind: Any) -> None:
    count = (1 << 18) + 777 if kind == "normal" else (1 << 21) + 777
    whole = noise(5, 3, 2, 0, count, kind=kind)
    draw = random.Random(2)
    cuts = sorted({0, count, *(draw.randrange(count) for _ in range(12))})
    pieces = [noise(5, 3, 2, start, stop - start, kind=kind) for start, stop in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    assert noise(5, 3, 2, 17, 0, kind=kind).shape == (0,)


def test_rows_of_a_shard_have_the_numbers_that_they_have_in_the_whole() -> None:
    rows, columns = 12, 37
    whole = noise(1, 1, 0, 0, rows * columns).view(rows, columns)
    for rank in range(3):
        shard = noise(1, 1, 0, rank * 4 * columns, 4 * columns).view(4, columns)
        assert torch.equal(shard, whole[rank * 4 : rank * 4 + 4])


def test_nothing_random_is_drawn_on_the_way() -> None:
    before = torch.get_rng_state()
    noise(1, 1, 0, 0, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_places_out_of_range_are_our_mistake() -> None:
    for arguments in ((-1, 1, 0, 0, 1), (1 << 64, 1, 0, 0, 1), (0, 1 << 32, 0, 0, 1), (0, 0, 0, 1 << 35, 1)):
        with pytest.raises(AssertionError):
            noise(*arguments)


def _moments(z: Tensor, power: int) -> tuple[float, float]:
    """Mean of the z^power of the table, and its standard deviation: exact."""
    values = normal_quantiles().double() ** power
    return float(values.mean()), float(values.std(correction=0))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345])
def test_moments_up_to_kurtosis_and_beyond(seed: int) -> None:
    z = noise(seed, 1, 0, 0, MANY).double()
    for power in range(1, 7):
        mean, deviation = _moments(z, power)
        score = (float((z**power).mean()) - mean) / deviation * MANY**0.5
        assert abs(score) < _bound(18), (power, score)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345])
def test_tails_and_every_part_of_the_range(seed: int) -> None:
    z = noise(seed, 1, 0, 0, MANY)
    for beyond in (1.0, 2.0, 3.0, 4.0, 4.3):
        share = float((normal_quantiles() > beyond).double().mean())
        for side in (z, -z):
            score = (float((side > beyond).double().mean()) - share) / (share * (1 - share) / MANY) ** 0.5
            assert abs(score) < _bound(30), (beyond, score)
    # Chi-squared over 1,024 parts of 64 entries each, in Wilson's and Hilferty's normal approximation.
    parts, free = 1024, 1023
    counts = torch.bincount(torch.searchsorted(normal_quantiles(), z) // 64, minlength=parts).double()
    chi = float(((counts - MANY / parts) ** 2).sum()) / (MANY / parts)
    score = ((chi / free) ** (1 / 3) - (1 - 2 / (9 * free))) / (2 / (9 * free)) ** 0.5
    assert abs(score) < _bound(3), score


def test_signs_are_fair() -> None:
    z = noise(3, 1, 0, 0, MANY, kind="rademacher")
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.double().mean())) * MANY**0.5 < _bound(1)


def _check_uncorrelated(vectors: Tensor) -> None:
    """No pair of rows is correlated, and all pairs together are as little correlated as independent ones."""
    rows, count = vectors.shape
    unit = vectors - vectors.mean(dim=1, keepdim=True)
    unit = unit / unit.norm(dim=1, keepdim=True)
    pairs = (unit @ unit.T)[tuple(torch.triu_indices(rows, rows, 1))] * count**0.5
    assert float(pairs.abs().max()) < _bound(2 * len(pairs))
    spread = float((pairs**2).mean() - 1) / (2 / len(pairs)) ** 0.5
    assert abs(spread) < _bound(2), spread


@pytest.mark.parametrize(("kind", "square"), [("normal", False), ("normal", True), ("rademacher", False)])
def test_tensors_steps_workers_and_seeds_are_uncorrelated(kind: Any, square: bool) -> None:
    count = 1 << 14
    rows = [
        noise(seed, step, tensor, 0, count, direction=worker, kind=kind).double()
        for seed in (7, 8, 7 << 32)
        for step in (1, 2, 3, 4)
        for tensor in (0, 1, 2, 3)
        for worker in (0, 1, 2, 3)
    ]
    vectors = torch.stack(rows)
    _check_uncorrelated(vectors**2 if square else vectors)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_neighbours_are_uncorrelated(kind: Any) -> None:
    z = noise(11, 4, 2, 0, 1 << 19, kind=kind).double()
    for lags in (range(1, 33), (64, 128, 256, 1024, 4096)):
        for lag in lags:
            score = float((z[lag:] * z[:-lag]).mean()) * (len(z) - lag) ** 0.5
            assert abs(score) < _bound(37), (lag, score)
