"""Shapes as matrices, and rounding to bfloat16 without bias."""

from __future__ import annotations

import math

import pytest
import torch

from trainers.optim import keyed
from trainers.optim.tensors import as_matrix, local, round_to, sharded


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), None), ((5,), None), ((4, 6), (1, 4, 6)), ((8, 4, 6), (8, 4, 6)), ((8, 4, 3, 3), (1, 8, 36))],
)
def test_shapes(shape: tuple[int, ...], matrix: tuple[int, int, int] | None) -> None:
    assert as_matrix(shape) == matrix


def test_plain_tensors_are_local_and_whole() -> None:
    tensor = torch.zeros(3)
    assert local(tensor) is tensor
    assert not sharded(tensor)


def test_rounding_is_right_on_average_and_never_further_than_a_neighbour() -> None:
    value = torch.tensor([1.001, -1.001, 3.14159, 1e-3, 0.0, 65504.5]).repeat(20_000, 1)
    target = torch.empty_like(value, dtype=torch.bfloat16)
    round_to(target, value, keyed.generator(7))
    gap = value.abs() * 2**-7
    assert ((target.float() - value).abs() <= gap).all()
    # The mean of 20,000 draws of a two-valued variable: five standard errors.
    assert ((target.float() - value).mean(0).abs() <= 5 * gap[0] / 2 / math.sqrt(20_000)).all()
    exact = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf])
    kept = torch.empty(5, dtype=torch.bfloat16)
    round_to(kept, exact, keyed.generator(7))
    assert torch.equal(kept.float(), exact)
    round_to(kept, torch.full((5,), math.nan), keyed.generator(7))
    assert kept.isnan().all()


def test_updates_below_the_last_place_are_not_lost() -> None:
    weights = torch.ones(4096, dtype=torch.bfloat16)
    nearest = weights.clone()
    for step in range(100):
        round_to(weights, weights.float() + 1e-4, keyed.generator(keyed.key(0, step)))
        round_to(nearest, nearest.float() + 1e-4, None)
    assert (nearest == 1).all()
    assert abs(float(weights.float().mean()) - 1.01) < 5e-4
