"""What the published FRUGAL and GaLore get wrong, one test each: here it is right."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.trainers.optim.helpers import give, problem, run, state_bytes
from trainers.optim import Frugal, GaLore, split_parameters

ALL = [{"split": s} for s in ("columns", "rows", "column_blocks", "randk", "svd", "random")]


def test_parameters_may_come_as_an_iterator() -> None:
    layer = torch.nn.Linear(4, 4)
    for params in (layer.parameters(), iter([{"params": layer.parameters()}]), layer.named_parameters()):
        optimizer = Frugal(params)  # type: ignore[arg-type]
        assert len([p for group in optimizer.param_groups for p in group["params"]]) == 2


@pytest.mark.parametrize("settings", [*ALL, {"split": "block", "density": 1.0}], ids=str)
def test_a_frozen_first_parameter_does_not_reset_the_others(settings: dict[str, Any]) -> None:
    w, gradients = problem((8, 12), 6)
    (alone,), _ = run(lambda ps: Frugal(ps, update_gap=4, **settings), [w], [[g] for g in gradients])
    frozen, p = torch.nn.Parameter(torch.zeros(8, 12)), torch.nn.Parameter(torch.tensor(w))
    optimizer = Frugal([frozen, p], update_gap=4, **settings)
    for gradient in gradients:
        give([p], [gradient])
        optimizer.step()
    assert frozen not in optimizer.state
    assert int(optimizer.state[p]["step"]) == 6
    assert int(optimizer.state[p]["refreshes"]) == 2
    assert not frozen.any()
    del alone


@pytest.mark.parametrize("settings", [*ALL, {"split": "block", "density": 1.0}], ids=str)
def test_a_first_gradient_may_come_late_and_gradients_may_be_missing(settings: dict[str, Any]) -> None:
    w, gradients = problem((8, 12), 6)
    calm = {"update_gap": 3, **settings}
    (first, late), optimizer = run(
        lambda ps: Frugal(ps, **calm), [w, w], [[g, None if i < 2 else g] for i, g in enumerate(gradients)]
    )
    assert int(optimizer.state[late]["step"]) == 4
    assert int(optimizer.state[late]["refreshes"]) == 2
    (_, again), _ = run(lambda ps: Frugal(ps, **calm), [w, w], [[None, g] for g in gradients[2:]])
    assert torch.equal(late, again), "its own clock, whatever the others did"
    before = first.detach().clone()
    give([first, late], [None, gradients[0]])
    optimizer.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("free", ["same", "sign_sgd", "no"])
def test_a_rule_that_does_not_exist_is_refused(free: str) -> None:
    with pytest.raises(ValueError, match="free must be one of sign, sgd, none"):
        Frugal([torch.nn.Parameter(torch.zeros(2, 2))], free=free)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"split": "block", "density": 1.0}, {"role": "full"}, {"split": "columns"}], ids=str
)
def test_momentum_begins_with_the_gradient_and_not_with_the_weight(settings: dict[str, Any]) -> None:
    w, gradients = problem((8, 12), 1)
    (p,), optimizer = run(
        lambda ps: Frugal([{"params": ps, **settings}], lr=0.1, density=1.0, full="sgdm"), [w], [[gradients[0]]]
    )
    assert np.allclose(optimizer.state[p]["momentum_buffer"], gradients[0], atol=0)
    assert np.allclose(p.detach().numpy(), w - 0.1 * gradients[0], atol=1e-15)


@pytest.mark.parametrize("columns", [49, 98, 103, 576, 768, 3072])
def test_a_rank_as_a_density_is_that_rank(columns: int) -> None:
    """Rounded down, 8 / n of n columns is 7 for some 500 of the widths up to 4096."""
    p = torch.nn.Parameter(torch.zeros(2, columns))
    p.grad = torch.ones_like(p)
    optimizer = Frugal([p], density=8 / columns)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (2, 8)


def test_no_indices_are_stored_for_scattered_elements() -> None:
    w, gradients = problem((64, 64), 1)
    (p,), optimizer = run(lambda ps: Frugal(ps, split="randk"), [w], [[gradients[0]]], dtype=torch.float32)
    assert state_bytes(optimizer) == 2 * 4 * 1024 + 24
    assert set(optimizer.state[p]) == {"step", "refreshes", "since", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("settings", [*ALL, {"split": "block"}], ids=str)
def test_all_state_loads_without_pickle(settings: dict[str, Any]) -> None:
    w, gradients = problem((8, 12), 2)
    _, optimizer = run(lambda ps: Frugal(ps, **settings), [w], [[g] for g in gradients])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("settings", [*ALL, {"split": "block", "density": 0.5}], ids=str)
def test_torchs_random_numbers_are_neither_used_nor_moved(settings: dict[str, Any]) -> None:
    w, gradients = problem((8, 12), 5)
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        parameters, _ = run(lambda ps: Frugal(ps, update_gap=2, **settings), [w, w], [[g, g] for g in gradients])
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("make", [Frugal, GaLore])
def test_the_closure_runs_with_gradients_and_its_loss_comes_back(make: Any) -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make([p])
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss.detach()

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss) == 16
    assert float(p.detach().max()) < 1


def test_weight_decay_follows_lr_alone() -> None:
    w, gradients = problem((8, 12), 1)
    ends = []
    for decay in (0.0, 0.5):
        (p,), _ = run(lambda ps, d=decay: Frugal(ps, lr=0.1, lr_scale=0.3, weight_decay=d), [w], [[gradients[0]]])
        ends.append(p.detach().numpy())
    assert np.allclose(ends[0] - ends[1], 0.1 * 0.5 * w, atol=1e-14)


def test_grouped_queries_small_vocabularies_and_tied_heads_train(tiny_llama: object) -> None:
    from core.models.load import load

    model = load("tiny-llama").model
    for make in (Frugal, GaLore):
        optimizer = make(split_parameters(model), lr=1e-3)
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("make", [Frugal, GaLore])
def test_no_parameter_is_silently_left_out(make: Any) -> None:
    shapes = [(), (5,), (4, 6), (2, 4, 6), (4, 3, 3, 3), (1, 7), (7, 1)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.ones_like(p)
    make(parameters).step()
    assert all((p < 1).all() for p in parameters)


def test_sparse_gradients_are_refused_in_words() -> None:
    embedding = torch.nn.Embedding(5, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        Frugal(embedding.parameters()).step()
