"""A basis learned for all layers of a type: against its oracle, resumable, and better at what it is for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.checkpoint import flatten_optimizer, unflatten_optimizer
from tests.unit.trainers.optim.oracles import learned as oracle
from tests.unit.trainers.optim.projected_helpers import follow, gradients, nbytes, start
from trainers.optim import DctAdamW, Trion
from trainers.optim.bases import build
from trainers.optim.learned import eigenbasis, family, plan

SETTINGS: dict[str, Any] = {"basis": "learned", "side": "right", "learn_steps": 3, "learn_gap": 5}
SHAPES = ((20, 12), (30, 12), (12, 12))


def test_layers_are_told_apart_by_what_they_are() -> None:
    assert family("model.layers.0.self_attn.q_proj.weight") == family("model.layers.9.self_attn.v_proj.weight") == "qkv"
    assert family("model.layers.0.mlp.gate_proj.weight") == family("model.layers.1.mlp.up_proj.weight") == "up"
    assert family("model.layers.0.mlp.down_proj.weight") == "down_proj"
    assert family("encoder.layer.0.output.dense.weight") == "dense"


def test_windows_end_where_bases_change() -> None:
    found = [plan(step, 3, 5) for step in range(1, 15)]
    assert [step for step, (add, _, _) in enumerate(found, 1) if add] == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert [step for step, (_, renew, _) in enumerate(found, 1) if renew] == [1, 3, 8, 13]
    assert [step for step, (_, _, close) in enumerate(found, 1) if close] == [3, 8, 13]
    assert plan(1, 1, 1) == (True, True, True)


@pytest.mark.parametrize("ages", [False, True])
def test_equals_the_oracle(ages: bool) -> None:
    weights = [start(shape) for shape in SHAPES]
    optimizer = DctAdamW(weights, rank=4, lr=1e-2, weight_decay=0.0, ages=ages, **SETTINGS)
    steps = [[gradients(shape)[t] for shape in SHAPES] for t in range(14)]
    follow(optimizer, [dict(zip(weights, grads, strict=True)) for grads in steps])
    wanted, bases = oracle.run(
        [start(shape).detach().numpy() for shape in SHAPES],
        [[g.numpy() for g in grads] for grads in steps],
        rank=4,
        learn_steps=3,
        learn_gap=5,
        ages=ages,
        lr=1e-2,
    )
    assert len(bases) == 4
    held = optimizer.state[weights[0]]["eigenbasis"]
    assert torch.allclose(held @ held.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
    for found, expected in zip(weights, wanted, strict=True):
        assert np.abs(found.detach().numpy() - expected).max() <= 1e-9


@pytest.mark.parametrize("kind", [DctAdamW, Trion])
@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_saved_and_loaded_is_never_interrupted(kind: Any, stop: int) -> None:
    steps = [[gradients(shape)[t] for shape in SHAPES] for t in range(12)]

    def go(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, some: slice) -> None:
        follow(optimizer, [dict(zip(weights, grads, strict=True)) for grads in steps[some]])

    straight = [start(shape, torch.float32) for shape in SHAPES]
    go(straight, kind(straight, rank=4, **SETTINGS), slice(12))
    weights = [start(shape, torch.float32) for shape in SHAPES]
    optimizer = kind(weights, rank=4, **SETTINGS)
    go(weights, optimizer, slice(stop))
    tensors, values = flatten_optimizer(optimizer.state_dict())
    again = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = kind(again, rank=4, **SETTINGS)
    resumed.load_state_dict(unflatten_optimizer(tensors, json.loads(json.dumps(values))))
    go(again, resumed, slice(stop, 12))
    assert all(torch.equal(one, other) for one, other in zip(straight, again, strict=True))


def test_one_basis_for_each_type_and_a_sum_only_while_a_window_is_open() -> None:
    shapes = {"a.q_proj.weight": (16, 8), "b.k_proj.weight": (16, 8), "a.o_proj.weight": (16, 8)}
    named = {name: start(shape, torch.float32) for name, shape in shapes.items()}
    optimizer = DctAdamW(named.items(), rank=2, **SETTINGS)
    bytes_at = []
    for step in range(4):
        follow(optimizer, [{p: gradients((16, 8))[step] for p in named.values()}])
        bytes_at.append(nbytes(optimizer))
    matrices = 3 * (2 * 16 * 2 * 4 + 4 * 2 + 4)
    types = 2 * (4 + 4 * 8 * 8)
    assert bytes_at[3] == matrices + types
    assert bytes_at[0] == matrices + types + 2 * 4 * 8 * 8
    owners = [name for name, p in named.items() if "eigenbasis" in optimizer.state[p]]
    assert owners == ["a.q_proj.weight", "a.o_proj.weight"]


def test_a_type_whose_first_layer_has_no_gradient_learns_from_the_others() -> None:
    frozen, weight = start((20, 12)), start((20, 12))
    optimizer = DctAdamW([frozen, weight], rank=4, **SETTINGS)
    before = weight.detach().clone()
    follow(optimizer, [{frozen: None, weight: g} for g in gradients((20, 12), steps=4)])
    assert not torch.equal(weight, before)
    assert "exp_avg" not in optimizer.state[frozen]
    follow(optimizer, [{frozen: gradients((20, 12))[0], weight: None}])
    assert "exp_avg" in optimizer.state[frozen]


def test_captures_shared_directions_that_cosines_spread() -> None:
    draw = torch.Generator().manual_seed(2)
    n, r = 64, 8
    shared = torch.linalg.qr(torch.randn(n, r, generator=draw, dtype=torch.float64))[0]

    def layer() -> torch.Tensor:
        signal = torch.randn(100, r, generator=draw, dtype=torch.float64) @ shared.T
        return signal + 0.1 * torch.randn(100, n, generator=draw, dtype=torch.float64)

    total = sum((g.T @ g / g.square().sum() for g in (layer() for _ in range(6))), torch.zeros(n, n).double())
    fresh = layer()
    captured = {}
    for name, basis in (("learned", eigenbasis(total)), ("dct", build("dct", n))):
        energies = (fresh @ basis.T).square().sum(0)
        captured[name] = float(energies.sort(descending=True).values[:r].sum() / energies.sum())
    assert captured["learned"] > 0.9
    assert captured["dct"] < 0.4


def test_eigenvectors_have_a_fixed_sign() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = eigenbasis(x.T @ x)
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()
    values = ((x @ basis.T) ** 2).sum(0)
    assert torch.equal(values, values.sort(descending=True).values)


def test_steps_on_the_meta_device() -> None:
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(shape)) for shape in ((30, 20), (40, 20))]
    for kind in (DctAdamW, Trion):
        optimizer: Any = kind(weights, rank=4, **SETTINGS)
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        assert optimizer.state[weights[0]]["eigenbasis"].shape == (20, 20)
