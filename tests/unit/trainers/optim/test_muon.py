"""Muon and AdamW as one optimizer: exactly torch's two, with one state that loads."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from core.checkpoint import flatten_optimizer, unflatten_optimizer
from tests.unit.trainers.optim.projected_helpers import follow, gradients, start
from trainers.optim.muon import MuonAdamW

SHAPES = ((20, 12), (12, 20), (9, 4), (10,))


def _make(weights: list[nn.Parameter]) -> MuonAdamW:
    return MuonAdamW(
        [
            {"params": weights[:2], "role": "projected", "weight_decay": 0.1},
            {"params": weights[2:], "role": "full", "lr": 1e-3, "betas": (0.9, 0.95)},
        ]
    )


def _go(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, some: range) -> None:
    follow(optimizer, [{w: gradients(w.shape)[t] for w in weights} for t in some])


def test_equals_torchs_two_optimizers() -> None:
    weights, others = ([start(shape, torch.float32) for shape in SHAPES] for _ in range(2))
    _go(weights, _make(weights), range(6))
    _go(others[:2], torch.optim.Muon(others[:2], lr=0.02, weight_decay=0.1), range(6))
    _go(others[2:], torch.optim.AdamW(others[2:], lr=1e-3, betas=(0.9, 0.95)), range(6))
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_saved_and_loaded_is_never_interrupted() -> None:
    straight = [start(shape, torch.float32) for shape in SHAPES]
    _go(straight, _make(straight), range(9))
    weights = [start(shape, torch.float32) for shape in SHAPES]
    optimizer = _make(weights)
    _go(weights, optimizer, range(4))
    tensors, values = flatten_optimizer(optimizer.state_dict())
    again = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = _make(again)
    resumed.load_state_dict(unflatten_optimizer(tensors, json.loads(json.dumps(values))))
    copied, twin = copy.deepcopy((weights, optimizer))
    for own, one in ((again, resumed), (copied, twin)):
        _go(own, one, range(4, 9))
        assert all(torch.equal(a, b) for a, b in zip(straight, own, strict=True))


def test_a_scheduler_reaches_both() -> None:
    weights = [start(shape, torch.float32) for shape in SHAPES]
    optimizer = _make(weights)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = [weight.detach().clone() for weight in weights]
    _go(weights, optimizer, range(1))
    scheduler.step()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_the_closure_runs_once_with_gradients() -> None:
    weights = [start(shape, torch.float32) for shape in SHAPES]
    optimizer, calls = _make(weights), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = torch.stack([w.square().sum() for w in weights]).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert calls == [True]


def test_groups_need_a_role() -> None:
    with pytest.raises(ValueError, match="role projected or full, not None"):
        MuonAdamW([{"params": [start((4, 4))]}])


def test_a_late_group_is_stepped_as_one_given_at_the_start() -> None:
    weights, others = ([start(shape, torch.float32) for shape in SHAPES] for _ in range(2))
    optimizer = MuonAdamW([{"params": weights[:2], "role": "projected", "weight_decay": 0.1}])
    optimizer.add_param_group({"params": iter(weights[2:]), "role": "full", "lr": 1e-3, "betas": (0.9, 0.95)})
    _go(weights, optimizer, range(4))
    _go(others, _make(others), range(4))
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_a_late_group_is_refused_as_one_given_at_the_start() -> None:
    optimizer = _make([start(shape, torch.float32) for shape in SHAPES])
    with pytest.raises(ValueError, match="role projected or full, not None"):
        optimizer.add_param_group({"params": [start((4, 4))]})
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        optimizer.add_param_group({"params": [start((4,))], "role": "projected"})
    assert len(optimizer.param_groups) == 2
