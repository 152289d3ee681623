"""The median of sizes, counted, is the one that sorting finds."""

from __future__ import annotations

import pytest
import torch

from trainers.optim import median
from trainers.optim.median import median_size


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 1001, 5000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_equals_sorting(count: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(median, "_CHUNK", 700)
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale
    parts = [values[: count // 3].view(-1, 1), torch.zeros(50), values[count // 3 :]]
    assert median_size(parts) == float(values.abs().median())


def test_ties_and_numbers_that_share_their_high_bits() -> None:
    close = 1 + torch.arange(301) * 2.0**-23
    assert median_size([close.flip(0)]) == float(close[150])
    assert median_size([torch.tensor([2.0, -2.0, 2.0, 5.0])]) == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 3, 99).to(dtype)
    assert median_size([values]) == float(values[values != 0].float().abs().median())


def test_nothing_but_zeros() -> None:
    with pytest.raises(ValueError, match="give eps"):
        median_size([torch.zeros(3), torch.zeros(0)])
