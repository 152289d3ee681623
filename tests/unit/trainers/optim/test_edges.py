"""At the edges: rates of zero, updates below a weight's last place, copies, and processes that are not there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from trainers.optim import DctAdamW, Frugal, GaLore, Trion, release_gradients, split_parameters

ALL: list[Any] = [Frugal, GaLore, DctAdamW, Trion]
ROLES = ["projected", "full"]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("role", ROLES)
def test_bfloat16_weights_drift_by_what_is_below_their_last_place(kind: Any, role: str) -> None:
    """Decay of a tenth of the last place: nothing moves under rounding to nearest; under draws that are the same in
    each step a tenth of the weights take all of it."""
    start, place, steps = 0.99609375, 2.0**-8, 20
    weight = nn.Parameter(torch.full((64, 64), start, dtype=torch.bfloat16))
    decay = 0.1 * place / start
    rates = {"lr": decay} | ({"adam_lr": decay} if kind is Trion else {})
    optimizer = kind([{"params": [weight], "role": role}], **rates, weight_decay=1.0)
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    moved = (start - weight.detach().float()) / place
    assert float(moved.mean()) == pytest.approx(0.1 * steps, rel=0.1)
    assert float(moved.max()) <= 12, "of 4,096 draws of 20 coins of a tenth"


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_of_zero_moves_moments_alone(kind: Any, role: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 96, dtype=dtype).view(8, 12))
    before = weight.detach().clone()
    rates = {"lr": 0.0} | ({"adam_lr": 0.0} if kind is Trion else {})
    optimizer = kind([{"params": [weight], "role": role}], **rates, weight_decay=0.5)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, before)
    assert any(bool(value.any()) for name, value in optimizer.state[weight].items() if name != "step")


@pytest.mark.parametrize("kind", ALL)
def test_a_copy_goes_on_as_the_original(kind: Any) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12))
    optimizer = kind([weight], weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        weight.grad = torch.randn(8, 12, generator=draw)
        optimizer.step()
    other, its_optimizer = copy.deepcopy((weight, optimizer))
    for _ in range(2):
        weight.grad = torch.randn(8, 12, generator=draw)
        other.grad = weight.grad.clone()
        optimizer.step()
        its_optimizer.step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1.0])
def test_a_tiny_rate_without_state_spoils_nothing(scale: float) -> None:
    """The sweep works in units of that rate unless it is too small for them."""
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(48, 64, generator=draw, dtype=torch.float64) for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.float64):
        weight = nn.Parameter(torch.zeros(48, 64, dtype=dtype))
        optimizer = Frugal([weight], lr=1e-2, free_lr_scale=scale)
        for gradient in gradients:
            weight.grad = gradient.to(dtype)
            optimizer.step()
        found.append(weight.detach().double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) <= 1e-5


@pytest.mark.parametrize("processes", [1, 2])
def test_release_is_for_one_process(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    optimizer = Frugal([nn.Parameter(torch.ones(4, 4))])
    if processes == 1:
        release_gradients(optimizer)()
        return
    with pytest.raises(ValueError, match="run one process"):
        release_gradients(optimizer)


def test_a_bias_of_two_dimensions_is_no_matrix_to_project() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)
            self.relative_bias = nn.Parameter(torch.zeros(3, 5))

    groups = split_parameters(nn.ModuleDict({"attn": Attention()}))
    roles = {name: group["role"] for group in groups for name in group["names"]}
    assert roles == {"attn.query.weight": "projected", "attn.query.bias": "full", "attn.relative_bias": "full"}
