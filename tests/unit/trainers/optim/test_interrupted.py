"""Interrupted and resumed is never interrupted, to the last bit, in the middle of an interval and at its ends."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from core.checkpoint import flatten_optimizer, load, save, unflatten_optimizer
from tests.unit.trainers.optim.helpers import give, problem
from tests.unit.trainers.optim.test_frugal import SHAPES, SPLITS
from trainers.optim import Frugal, GaLore

STEPS, GAP = 11, 4
MAKERS: list[tuple[Any, dict[str, Any]]] = [
    *((Frugal, {"update_gap": GAP, **settings}) for settings in SPLITS),
    (Frugal, {"update_gap": GAP, "compat": "official"}),
    (GaLore, {"update_gap": GAP, "rank": 3}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "settings"), MAKERS, ids=str)
def test_interrupted_is_uninterrupted(kind: Any, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Any) -> None:
    problems = [problem(shape, STEPS, seed) for seed, shape in enumerate(SHAPES)]
    straight = [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w, _ in problems]
    optimizer = kind(list(straight), **settings)
    kept: dict[int, tuple[list[Any], Any]] = {}
    for step in range(STEPS):
        # The last parameter gets its first gradient late, so its interval is out of line with the others.
        give(straight, [None if i == len(SHAPES) - 1 and step < 2 else g[step] for i, (_, g) in enumerate(problems)])
        optimizer.step()
        if step + 1 in (1, 3, 4, 6, 8, 9):
            weights = [p.detach().clone() for p in straight]
            if step % 2:
                tensors, values = flatten_optimizer(optimizer.state_dict())
                folder = save(tmp_path, step=step, tensors=tensors, state=values)
                kept[step + 1] = weights, load(folder)
            else:
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                kept[step + 1] = weights, buffer
    for at, (weights, saved) in kept.items():
        resumed = [torch.nn.Parameter(w.clone()) for w in weights]
        again = kind(list(resumed), **settings)
        if isinstance(saved, io.BytesIO):
            saved.seek(0)
            again.load_state_dict(torch.load(saved, weights_only=True))
        else:
            again.load_state_dict(unflatten_optimizer(saved.tensors, saved.state))
        for step in range(at, STEPS):
            give(resumed, [None if i == len(SHAPES) - 1 and step < 2 else g[step] for i, (_, g) in enumerate(problems)])
            again.step()
        assert all(torch.equal(a, b) for a, b in zip(resumed, straight, strict=True)), at
        mine, theirs = again.state_dict()["state"], optimizer.state_dict()["state"]
        assert mine.keys() == theirs.keys()
        for number, state in mine.items():
            assert state.keys() == theirs[number].keys()
            assert all(torch.equal(value, theirs[number][name]) for name, value in state.items())
            assert all(value.dtype == theirs[number][name].dtype for name, value in state.items())


def test_an_optimizer_that_has_stepped_can_be_taken_back() -> None:
    """What was worked out for the state before must not outlive it."""
    w, gradients = problem((12, 20), 12)
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer = Frugal([p], update_gap=4, select="top", density=0.3)
    for gradient in gradients[:3]:
        give([p], [gradient])
        optimizer.step()
    saved, weights = optimizer.state_dict(), p.detach().clone()
    saved = {"state": {0: {k: v.clone() for k, v in saved["state"][0].items()}}, "param_groups": saved["param_groups"]}
    ends = []
    for _ in range(2):
        other = torch.nn.Parameter(torch.tensor(w))
        used = Frugal([other], update_gap=4, select="top", density=0.3)
        give([other], [gradients[0][:, ::-1].copy()])
        used.step()
        used.load_state_dict(saved)
        with torch.no_grad():
            other.copy_(weights)
        for gradient in gradients[3:6]:
            give([other], [gradient])
            used.step()
        ends.append(other.detach().clone())
    for gradient in gradients[3:6]:
        give([p], [gradient])
        optimizer.step()
    assert torch.equal(ends[0], p)


def test_an_optimizer_whose_state_was_cleared_begins_anew() -> None:
    """The first refresh of the new state has the number of the first of the old one, and another gradient."""
    w, gradients = problem((12, 20), 2)
    ends = []
    for first in gradients:
        p = torch.nn.Parameter(torch.tensor(w))
        optimizer = Frugal([p], select="top", density=0.3)
        give([p], [first])
        optimizer.step()
        optimizer.state.clear()
        with torch.no_grad():
            p.copy_(torch.tensor(w))
        for gradient in (gradients[1][:, ::-1].copy(), gradients[1]):
            give([p], [gradient])
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)
