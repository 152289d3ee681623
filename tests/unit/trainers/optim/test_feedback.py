"""Quantised error feedback: 255 and 15 real levels, and codes that come back in the right places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.trainers.optim.oracles.dct_adamw import quantised
from trainers.optim.feedback import decode, empty_codes, encode


def _values(rows: int, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 576, 1000])
def test_codes_are_the_definition(bits: int, n: int) -> None:
    x = _values(5, n)
    found = decode(encode(x, bits), n)
    assert found.shape == x.shape
    assert np.abs(found.numpy() - quantised(x.numpy(), bits)).max() <= 1e-14


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.01), (4, 0.12)])
def test_the_error_of_a_wide_row_is_small(bits: int, limit: float) -> None:
    # With 16 levels in 8 bits it would be 0.11, and with the 4-bit halves swapped about 1.4.
    x = _values(64, 4096, torch.float32)
    found = decode(encode(x, bits), 4096)
    assert found.dtype == torch.float32
    error = float((found - x).norm() / x.norm())
    assert limit / 3 < error <= limit


def test_eight_bits_use_every_level_and_four_bits_take_half_the_bytes() -> None:
    x = torch.linspace(-1, 1, 256)[None]
    assert encode(x, 8).code.unique().numel() == 256
    assert encode(x, 4).code.shape == (1, 128)
    assert encode(_values(3, 7), 4).code.shape == (3, 4)
    assert encode(x, 8).code.dtype == torch.uint8


def test_a_block_of_equal_values_comes_back_exactly() -> None:
    x = torch.full((2, 300), 0.7)
    x[1] = 0.0
    for bits in (8, 4):
        assert torch.equal(decode(encode(x, bits), 300), x)
        assert not decode(empty_codes(2, 300, bits, torch.float32, x.device), 300).any()


def test_an_outlier_spoils_its_own_block_alone() -> None:
    x = _values(1, 512, torch.float32)
    x[0, 0] = 1e4
    error = (decode(encode(x, 8), 512) - x)[0, 256:].norm() / x[0, 256:].norm()
    assert error < 0.01
