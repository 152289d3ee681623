"""Gradient release: the same weights, no gradient left behind, and guards against what it cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainers.optim import Frugal, GaLore, release_gradients


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: Frugal(ps, 0.01, update_gap=2),
        lambda ps: Frugal(ps, 0.01, update_gap=2, split="block"),
        lambda ps: Frugal(ps, 0.01, update_gap=2, split="rows", select="top", state="carry"),
        lambda ps: GaLore(ps, 0.01, update_gap=2, rank=3),
    ],
)
def test_release_changes_no_bit_and_leaves_no_gradient(make: Any) -> None:
    plain = _model()
    released = copy.deepcopy(plain)
    data = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    one, two = make(plain.parameters()), make(released.parameters())
    undo = release_gradients(two)
    for _ in range(5):
        one.zero_grad()
        plain(data).square().sum().backward()
        one.step()
        released(data).square().sum().backward()
        assert all(p.grad is None for p in released.parameters())
        two.step()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), released.parameters(), strict=True))
    undo()
    released(data).sum().backward()
    assert all(p.grad is not None for p in released.parameters())


def test_at_most_one_gradient_is_held() -> None:
    model = _model()
    optimizer = Frugal(model.parameters())
    held: list[int] = []
    update = optimizer.update

    def counted(parameter: Tensor, group: dict[str, Any], place: int) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))
        update(parameter, group, place)

    optimizer.update = counted  # type: ignore[method-assign]
    release_gradients(optimizer)
    model(torch.ones(2, 8)).sum().backward()
    assert held == [1] * 6


def test_a_tied_weight_is_stepped_once_with_its_whole_gradient() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    other = nn.Parameter(weight.detach().clone())
    for p, release in ((weight, False), (other, True)):
        optimizer = Frugal([p], full="sgdm", density=1.0, lr=0.1)
        if release:
            release_gradients(optimizer)
        (torch.ones(1, 4) @ p @ p).sum().backward()
        optimizer.step()
    assert torch.equal(weight, other)


def test_accumulation_is_refused_before_and_during() -> None:
    model = _model()
    optimizer = Frugal(model.parameters())
    with pytest.raises(ValueError, match="cannot be accumulated over 4"):
        release_gradients(optimizer, accumulation=4)
    release_gradients(optimizer)
    model(torch.ones(2, 8)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"second backward pass before optimizer.step"):
        model(torch.ones(2, 8)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_clipping_by_the_norm_of_all_gradients_is_refused() -> None:
    optimizer = Frugal(_model().parameters())
    with pytest.raises(ValueError, match="set clip_norm to 0"):
        release_gradients(optimizer, clip_norm=1.0)
    release_gradients(optimizer, clip_norm=0)


def test_learning_rates_reach_a_step_after_a_state_was_loaded() -> None:
    """Loading replaces the groups by new ones, which are what a scheduler changes."""
    model = _model()
    optimizer = Frugal(model.parameters(), 0.01)
    release_gradients(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 8)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
