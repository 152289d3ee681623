"""Moments in eight bits: error, bias, size, and the floor under the mean square."""

from __future__ import annotations

import math

import pytest
import torch

from trainers.optim import keyed, moments8


def _coded(name: str, value: torch.Tensor, seed: int | None = 0) -> torch.Tensor:
    codes, scales = moments8.blank(name, tuple(value.shape), value.device)
    moments8.encode(name, value, codes, scales, None if seed is None else keyed.generator(keyed.key(seed)))
    return moments8.decode(name, codes, scales)


def test_the_error_is_below_a_step_of_the_block() -> None:
    value = torch.randn(10, 77, generator=torch.Generator().manual_seed(0))
    for start in range(0, 770, 256):
        block = value.view(-1)[start : start + 256]
        wrong = (_coded("exp_avg", value).view(-1)[start : start + 256] - block).abs()
        assert wrong.max() <= block.abs().max() / 127 * 1.001
    root, square = value.abs(), value.square()
    assert ((_coded("exp_avg_sq", square).sqrt() - root).abs() <= root.max() / 255 * 1.001).all()
    assert (_coded("exp_avg", value, None) - value).abs().max() <= value.abs().max() / 254 * 1.001


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_rounding_has_no_bias(name: str) -> None:
    value = torch.linspace(0.2, 1.0, 256)
    mean = torch.stack([_coded(name, value, seed) for seed in range(2000)]).mean(0)
    step = 1 / 127 if name == "exp_avg" else 2 / 255
    assert (mean - value).abs().max() <= 5 * step / 2 / math.sqrt(2000) + (1 / 255**2 if name == "exp_avg_sq" else 0)


def test_a_square_that_is_not_zero_stays_so() -> None:
    value = torch.full((256,), 1e-12)
    value[0], value[1] = 1.0, 0.0
    coded = _coded("exp_avg_sq", value)
    assert coded[1] == 0
    assert (coded[2:] > 0).all()


def test_a_mean_square_decays() -> None:
    value = torch.ones(256)
    value[0] = 4.0
    codes, scales = moments8.blank("exp_avg_sq", (256,), value.device)
    moments8.encode("exp_avg_sq", value, codes, scales, keyed.generator(0))
    for step in range(400):
        value = moments8.decode("exp_avg_sq", codes, scales)
        value[0] = 4.0
        value[1:] *= 0.999
        moments8.encode("exp_avg_sq", value, codes, scales, keyed.generator(keyed.key(1, step)))
    assert float(value[1:].mean()) == pytest.approx(0.999**400, rel=0.03)


def test_zeros_and_empty_tensors_are_coded() -> None:
    assert not _coded("exp_avg", torch.zeros(300)).any()
    assert _coded("exp_avg_sq", torch.zeros(4, 0)).shape == (4, 0)
