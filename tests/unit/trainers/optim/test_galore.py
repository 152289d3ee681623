"""GaLore against its formulas, and what it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.trainers.optim.helpers import SHAPES, problem, run, state_bytes
from tests.unit.trainers.optim.oracles import frugal as subspaces
from tests.unit.trainers.optim.oracles import galore as oracle
from trainers.optim import GaLore

STEPS, GAP = 13, 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["std", "reverse", "left", "right", "full"])
def test_equals_the_formulas(side: str, shape: tuple[int, int]) -> None:
    w, gradients = problem(shape, STEPS)
    tall = shape[0] >= shape[1]
    actual = {"std": "right" if tall else "left", "reverse": "left" if tall else "right"}.get(side, side)
    bases = {step: subspaces.leading(gradients[step - 1], actual, 3) for step in (1, 5, 9, 13)}
    numbers = {"lr": 0.01, "scale": 0.25, "weight_decay": 0.1}
    expected = oracle.galore(w, gradients, bases, **numbers)
    rows = [[g] for g in gradients]
    (p,), optimizer = run(lambda ps: GaLore(ps, side=side, rank=3, update_gap=GAP, **numbers), [w], rows)
    assert np.abs(p.detach().numpy() - expected).max() <= 1e-9
    (p,), _ = run(lambda ps: GaLore(ps, side=side, rank=3, update_gap=GAP, **numbers), [w], rows, dtype=torch.float32)
    start = w.astype(np.float32).astype(np.float64)
    if side == "full":
        return  # Off the diagonal a fresh full projection is rounding, and Adam makes steps of it: float32 has more.
    wrong = (p.detach().double().numpy() - start) - (expected - w)
    assert np.linalg.norm(wrong) <= 1e-5 * np.linalg.norm(expected - w)
    m, n = shape
    wanted = {"left": m * 3 + 2 * 3 * n, "right": 3 * n + 2 * m * 3, "full": 3 * (m + n) + 18}[actual] * 8 + 8
    assert state_bytes(optimizer) == wanted


def test_vectors_and_full_groups_are_not_projected_nor_scaled() -> None:
    start, gradients = zip(*(problem(shape, STEPS) for shape in [(7,), (5, 6)]), strict=True)
    rows = [[gradients[i][step] for i in range(2)] for step in range(STEPS)]
    parameters, _ = run(
        lambda ps: GaLore([{"params": ps[:1]}, {"params": ps[1:], "role": "full"}], 0.01, weight_decay=0.1), start, rows
    )
    for i, p in enumerate(parameters):
        w = start[i].reshape(-1, start[i].shape[-1])
        grads = [g.reshape(w.shape) for g in gradients[i]]
        whole = {1: (np.eye(w.shape[0]), np.eye(w.shape[1]))}
        expected = oracle.galore(w, grads, whole, lr=0.01, scale=1.0, weight_decay=0.1)
        assert np.abs(p.detach().numpy() - expected.reshape(start[i].shape)).max() <= 1e-9


def test_a_stack_is_so_many_matrices() -> None:
    w, gradients = problem((3, 8, 5), STEPS)
    (stack,), _ = run(lambda ps: GaLore(ps, rank=2, update_gap=GAP), [w], [[g] for g in gradients])
    for part in range(3):
        (one,), _ = run(lambda ps: GaLore(ps, rank=2, update_gap=GAP), [w[part]], [[g[part]] for g in gradients])
        assert torch.allclose(stack[part], one, atol=1e-12)


def test_rank_may_be_a_share_and_is_cut_at_a_small_matrix() -> None:
    w, gradients = problem((6, 20), 1)
    for settings, rank in (({"density": 0.5}, 3), ({"rank": 100}, 6), ({"density": 1e-9}, 1)):
        (p,), optimizer = run(lambda ps, s=settings: GaLore(ps, **s), [w], [[gradients[0]]])
        state = optimizer.state[p]
        assert state["exp_avg"].shape[1] == rank


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"rank": 0},
        {"density": 1.5},
        {"density": 0.0},
        {"update_gap": 2.5},
        {"update_gap": 0},
        {"betas": (0.9, 1.0)},
        {"side": "top"},
        {"eps": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GaLore([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
