"""A step is a step, however its rows are split: eight micro-batches of one are one of eight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.trainers.optim.test_interrupted import MAKERS


def _train(make: Any, settings: dict[str, Any], dtype: torch.dtype, size: int, steps: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
    data = torch.randn(steps, 8, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    optimizer = make(model.parameters(), lr=1e-2, **settings)
    for rows in data:
        optimizer.zero_grad()
        for start in range(0, 8, size):
            (model(rows[start : start + size]).square().sum() / 8).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


# Eight-bit moments round at random by their value, so that the last bit of a gradient may move a whole code.
EXACT = [(make, settings) for make, settings in MAKERS if settings.get("moments") != "int8"]


@pytest.mark.parametrize(("make", "settings"), EXACT, ids=str)
def test_one_by_eight_is_eight_by_one(make: Any, settings: dict[str, Any]) -> None:
    one, other = (_train(make, settings, torch.float64, size, 8) for size in (8, 1))
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) <= 1e-9


@pytest.mark.parametrize(("make", "settings"), EXACT, ids=str)
def test_in_float32_hardly_a_coordinate_differs(make: Any, settings: dict[str, Any]) -> None:
    one, other = (_train(make, settings, torch.float32, size, 4) for size in (8, 1))
    apart = torch.cat([((a - b).abs() > 1e-4).flatten() for a, b in zip(one, other, strict=True)])
    assert float(apart.float().mean()) <= 1e-4, "1,344 coordinates: none"
