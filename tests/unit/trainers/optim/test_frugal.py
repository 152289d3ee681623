"""What defines FRUGAL beside its formulas: what it keeps, what it repeats, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.trainers.optim.helpers import give, problem, run, state_bytes
from trainers.optim import Frugal

SPLITS: list[dict[str, Any]] = [
    {"split": "columns"},
    {"split": "columns", "select": "top", "state": "carry"},
    {"split": "columns", "state": "project", "density_end": 0.1, "decay_steps": 8},
    {"split": "columns", "moments": "int8"},
    {"split": "column_blocks", "block_columns": 4},
    {"split": "rows", "stagger": True},
    {"split": "rows", "state": "carry", "select": "top"},
    {"split": "randk", "state": "project"},
    {"split": "randk", "full": "lion", "moments": "int8"},
    {"split": "block", "density": 0.5},
    {"split": "svd", "full": "sgdm"},
    {"split": "svd", "moments": "int8", "state": "project"},
    {"split": "random", "side": "full", "state": "project"},
    {"split": "columns", "density": 0.0},
]
SHAPES = [(16, 24), (24, 16), (4, 16), (10,), (2, 8, 12)]


def _several(steps: int) -> tuple[list[Any], list[list[Any]]]:
    start, gradients = zip(*(problem(shape, steps, seed) for seed, shape in enumerate(SHAPES)), strict=True)
    return list(start), [[gradients[i][step] for i in range(len(SHAPES))] for step in range(steps)]


@pytest.mark.parametrize("settings", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal_and_no_gradient_is_touched(settings: dict[str, Any], dtype: torch.dtype) -> None:
    start, rows = _several(9)

    def untouched(step: int, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        for p, gradient in zip(parameters, rows[step - 1], strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, torch.tensor(gradient, dtype=dtype))

    torch.manual_seed(1)
    one, _ = run(lambda ps: Frugal(ps, update_gap=3, **settings), start, rows, dtype=dtype, each=untouched)
    torch.manual_seed(2)
    two, _ = run(lambda ps: Frugal(ps, update_gap=3, **settings), start, rows, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    moved = [float((p.detach().double().numpy() - w != 0).mean()) for p, w in zip(one, start, strict=True)]
    assert min(moved) > 0.5


@pytest.mark.parametrize("settings", [{"split": s} for s in ("columns", "rows", "randk", "random")], ids=str)
def test_the_seed_and_the_place_decide_on_the_subspace(settings: dict[str, Any]) -> None:
    w, gradients = problem((16, 24), 2)
    row = [[gradients[0], gradients[0]]]
    (a, b), _ = run(lambda ps: Frugal(ps, **settings), [w, w], row)
    (c, _), _ = run(lambda ps: Frugal(ps, seed=1, **settings), [w, w], row)
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("settings", SPLITS, ids=str)
def test_learns(settings: dict[str, Any]) -> None:
    target = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(12, 16))
    bias = torch.nn.Parameter(torch.ones(16))
    optimizer = Frugal([{"params": [p]}, {"params": [bias], "role": "full"}], lr=0.03, update_gap=5, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((p + bias - target) ** 2).sum()
        loss.backward()
        return loss.detach()

    first = float(optimizer.step(closure))
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 300)
        last = float(optimizer.step(closure))
    assert last < 0.01 * first


KEPT = [
    # (settings, bytes of state of a 40 x 96 float32 matrix: moments, then what says where they belong)
    ({"split": "columns"}, 2 * 4 * 40 * 24),
    ({"split": "columns", "full": "lion"}, 4 * 40 * 24),
    ({"split": "columns", "moments": "int8"}, 2 * 40 * 24 + 2 * 4 * 4),
    ({"split": "columns", "select": "top"}, 2 * 4 * 40 * 24 + 4 * 24 + 4 * 96),
    ({"split": "columns", "state": "carry"}, 2 * 4 * 40 * 24 + 4 * 24),
    ({"split": "column_blocks", "block_columns": 8}, 2 * 4 * 40 * 24),
    ({"split": "rows"}, 2 * 4 * 10 * 96),
    ({"split": "randk"}, 2 * 4 * 960),
    ({"split": "block", "density": 1.0}, 2 * 4 * 3840),
    ({"split": "block", "density": 0.0}, 0),
    ({"split": "svd", "side": "right"}, 2 * 4 * 40 * 24 + 4 * 24 * 96),
    ({"split": "random", "side": "left"}, 2 * 4 * 10 * 96 + 4 * 40 * 10),
    ({"split": "random", "side": "full"}, 2 * 4 * 100 + 4 * 10 * (40 + 96)),
    ({"split": "columns", "density": 0.0}, 0),
]


@pytest.mark.parametrize(("settings", "formula"), KEPT, ids=str)
def test_exactly_this_is_kept(settings: dict[str, Any], formula: int) -> None:
    w, gradients = problem((40, 96), 3)
    rows = [[g] for g in gradients]
    (p,), optimizer = run(lambda ps: Frugal(ps, update_gap=2, **settings), [w], rows, dtype=torch.float32)
    clock = 3 * 8
    assert state_bytes(optimizer) == formula + clock
    assert all(isinstance(value, Tensor) for value in optimizer.state[p].values())
    assert {"step", "refreshes", "since"} <= optimizer.state[p].keys()
    (p,), optimizer = run(lambda ps: Frugal(ps, update_gap=2, **settings), [w], rows, dtype=torch.bfloat16)
    assert state_bytes(optimizer) == formula + clock, "moments and bases of bfloat16 weights are float32"


@pytest.mark.parametrize("settings", SPLITS, ids=str)
def test_meta_tensors_can_be_planned(settings: dict[str, Any]) -> None:
    start, rows = _several(1)
    _, real = run(lambda ps: Frugal(ps, **settings), start, rows, dtype=torch.float32)
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.empty_like(p)
    planned = Frugal(parameters, **settings)
    planned.step()
    assert state_bytes(planned) == state_bytes(real)


def test_what_lies_outside_the_part_moves_by_its_sign_alone() -> None:
    w, gradients = problem((16, 24), 1)
    (p,), optimizer = run(lambda ps: Frugal(ps, lr=0.01, density=0.25), [w], [[gradients[0]]])
    moved = p.detach().numpy() - w
    signed = np.isclose(moved, -0.01 * np.sign(gradients[0]), atol=1e-12)
    # The first step of Adam is a sign too; the next one is not.
    assert signed.mean() > 0.99
    give([p], [gradients[0] * 0.1])
    before = p.detach().clone()
    optimizer.step()
    moved = (p.detach() - before).numpy()
    by_column = np.isclose(moved, -0.01 * np.sign(gradients[0]), atol=1e-12).all(0)
    assert by_column.sum() == 18


def test_bfloat16_weights_follow_float32_ones_on_average() -> None:
    shape, steps = (64, 64), 200
    gradient = np.ones(shape)
    rows = [[gradient]] * steps
    (p,), _ = run(lambda ps: Frugal(ps, lr=1e-4, update_gap=50), [np.ones(shape)], rows, dtype=torch.bfloat16)
    assert float(p.detach().float().mean()) == pytest.approx(1 - 1e-4 * steps, abs=1e-3)
    (p,), _ = run(lambda ps: Frugal(ps, lr=1e-4, compat="official"), [np.ones(shape)], rows, dtype=torch.bfloat16)
    assert (p == 1).all(), "rounded to nearest, steps below the last place are lost"


@pytest.mark.parametrize("state", ["reset", "project", "carry"])
def test_the_first_step_after_a_refresh(state: str) -> None:
    """A fresh column late in a run: 3.2 times lr when corrected as an old one, lr when it has an age of its own."""
    gradient = np.ones((4, 40))
    sizes: list[float] = []

    def size(step: int, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        now = parameters[0].detach().clone()
        if step == 3001:
            sizes.append(float((now - before[0]).abs().max()))
        before[0] = now

    before = [torch.zeros(4, 40, dtype=torch.float64)]
    run(
        lambda ps: Frugal(ps, lr=1.0, update_gap=3000, state=state),
        [np.zeros((4, 40))],
        [[gradient]] * 3001,
        each=size,
    )
    assert sizes[0] == pytest.approx(
        {"reset": 1.0, "project": 0.1 / 0.001**0.5 * 0.95**0.5, "carry": 1.0}[state], rel=0.02
    )


def test_a_long_tail_of_memory_layouts() -> None:
    w, gradients = problem((16, 24), 3)
    (plain,), _ = run(lambda ps: Frugal(ps, update_gap=2), [w], [[g] for g in gradients])
    turned = torch.nn.Parameter(torch.tensor(w.T.copy(), dtype=torch.float64).T)
    assert not turned.is_contiguous()
    optimizer = Frugal([turned], update_gap=2)
    for gradient in gradients:
        turned.grad = torch.tensor(gradient.T.copy(), dtype=torch.float64).T
        optimizer.step()
    assert torch.equal(turned, plain)


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.optim import coordinates

    w, gradients = problem((33, 40), 5)
    for settings in (
        {"split": "columns"},
        {"split": "rows"},
        {"split": "randk"},
        {"split": "column_blocks", "block_columns": 8},
    ):
        ends = []
        for tile in (1 << 20, 200, 40, 7):
            monkeypatch.setattr(coordinates, "TILE", tile)
            (p,), _ = run(lambda ps, s=settings: Frugal(ps, update_gap=2, **s), [w], [[g] for g in gradients])
            ends.append(p.detach().clone())
        assert all(torch.allclose(end, ends[0], rtol=0, atol=1e-14) for end in ends)


def test_groups_have_settings_of_their_own() -> None:
    w, gradients = problem((8, 12), 4)
    rows = [[g, g] for g in gradients]

    def make(ps: list[Any]) -> Frugal:
        return Frugal(
            [{"params": ps[:1], "density": 0.5, "betas": (0.5, 0.9), "lr": 0.1}, {"params": ps[1:], "split": "rows"}],
            density=0.25,
        )

    (a, b), optimizer = run(make, [w, w], rows)
    assert optimizer.state[a]["exp_avg"].shape == (8, 6)
    assert optimizer.state[b]["exp_avg"].shape == (2, 12)
    (alone,), _ = run(lambda ps: Frugal(ps, 0.1, density=0.5, betas=(0.5, 0.9)), [w], [[g] for g in gradients])
    assert torch.equal(a, alone)


def test_named_parameters_and_copies_work() -> None:
    layer = torch.nn.Linear(8, 8)
    optimizer = Frugal(layer.named_parameters(), update_gap=2)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    other = copy.deepcopy(optimizer)
    optimizer.step()
    mine = layer.weight.detach().clone()
    twin = other.param_groups[0]["params"][0]
    twin.grad = layer.weight.grad.clone()
    other.step()
    assert torch.equal(twin, mine)


WRONG = [
    ({"density": 1.1}, "density must be"),
    ({"lr": -1.0}, "lr must be"),
    ({"update_gap": 0}, "update_gap must be"),
    ({"split": "columsn"}, "split must be one of columns"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
    ({"density_end": 0.1}, "go together"),
    ({"split": "svd", "select": "top"}, "select='top'"),
    ({"split": "randk", "state": "carry"}, "state='carry'"),
    ({"split": "block", "state": "keep"}, "use state='reset'"),
    ({"split": "block", "stagger": True}, "stagger"),
    ({"split": "block", "moments": "int8"}, "int8"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frugal([torch.nn.Parameter(torch.zeros(4, 4))], **settings)
    with pytest.raises(ValueError, match=message):
        Frugal([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], **settings}])


def test_a_mirror_of_an_odd_number_is_refused() -> None:
    w, gradients = problem((4, 4), 1)
    with pytest.raises(ValueError, match="change density so that it is even"):
        run(lambda ps: Frugal(ps, split="block", order="mirror", density=0.5), [w] * 6, [[gradients[0]] * 6])


def test_among_equal_columns_the_first_are_chosen() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 400))
    p.grad = torch.ones_like(p)
    optimizer = Frugal([p], select="top", density=0.1)
    optimizer.step()
    assert optimizer.state[p]["indices"].tolist() == list(range(40))


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 4, 6), (4, 3, 3, 3), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("split", ["columns", "column_blocks", "rows", "randk", "block", "random"])
def test_every_shape_can_be_stepped(split: str, shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.ones(shape))
    p.grad = torch.ones_like(p)
    optimizer = Frugal([p], split=split)  # type: ignore[arg-type]
    optimizer.step()
    optimizer.step()
    assert (p < 1).all()
