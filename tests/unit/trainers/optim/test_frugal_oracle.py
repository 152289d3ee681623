"""Every variant of FRUGAL against its formulas in float64: four shapes, thirteen steps, refreshed every four."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.trainers.optim.helpers import SHAPES, problem, run
from tests.unit.trainers.optim.oracles import frugal as oracle
from trainers.optim import Frugal, keyed
from trainers.optim.clock import SUBSET

STEPS, GAP, BLOCK = 13, 4, 4
MEMORY = 0.9
"""Share of a column's running score that stays."""
LINES = ("columns", "column_blocks", "rows")
COMMON: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "lr_scale": 0.7, "free_lr_scale": 0.3}


def _settings(extra: dict[str, Any]) -> oracle.Settings:
    known = {"lr", "weight_decay", "lr_scale", "free_lr_scale", "full", "free", "state", "eps"}
    return oracle.Settings(**{name: value for name, value in (COMMON | extra).items() if name in known})


def _mask(
    split: str, shape: tuple[int, int], density: float, refresh: int, *, seed: int = 0, floor: bool = False
) -> Any:
    """The mask of a refresh, given the key: which lines a permutation puts first, told here in plain loops."""
    mask = np.zeros(shape, dtype=bool)
    total = {"columns": shape[1], "column_blocks": -(-shape[1] // BLOCK), "rows": shape[0], "randk": mask.size}[split]
    k = int(total * density) if floor else round(total * density)
    order = keyed.permutation(total, keyed.key(seed, SUBSET, 0, 0, refresh)).tolist()
    for line in order[:k]:
        if split == "columns":
            mask[:, line] = True
        elif split == "column_blocks":
            mask[:, line * BLOCK : (line + 1) * BLOCK] = True
        elif split == "rows":
            mask[line] = True
        else:
            mask.reshape(-1)[line] = True
    return mask


def _check(w: Any, gradients: list[Any], expected: Any, **settings: Any) -> None:
    """float64 within 1e-9; float32 within 1e-5 of the total change."""
    settings = COMMON | {"update_gap": GAP, "block_columns": BLOCK} | settings
    (p,), _ = run(lambda ps: Frugal(ps, **settings), [w], [[g] for g in gradients])
    assert np.abs(p.detach().numpy() - expected).max() <= 1e-9
    # Signs that hang on the last bit of a residual are no error of float32: they are left out.
    (p,), _ = run(lambda ps: Frugal(ps, **settings), [w], [[g] for g in gradients], dtype=torch.float32)
    start = w.astype(np.float32).astype(np.float64)
    wrong = (p.detach().double().numpy() - start) - (expected - w)
    flipped = np.abs(wrong) > COMMON["lr"] * COMMON["lr_scale"] * COMMON["free_lr_scale"]
    assert flipped.mean() <= (0.01 if settings["split"] in ("svd", "random") else 0)
    assert np.linalg.norm(wrong[~flipped]) <= 1e-5 * np.linalg.norm(expected - w)


@pytest.mark.parametrize(
    ("split", "state", "shape"),
    [
        (split, state, shape)
        for split, state, shape in [
            *itertools.product(LINES, ("reset", "keep", "project", "carry"), SHAPES),
            *itertools.product(["randk"], ("reset", "keep", "project"), SHAPES),
        ]
        # A last block that is cut short has fewer slots, and what "keep" does with them is not worth telling.
        if not (split == "column_blocks" and state == "keep" and shape[1] % BLOCK)
    ],
    ids=str,
)
def test_coordinates(split: str, state: str, shape: tuple[int, int]) -> None:
    w, gradients = problem(shape, STEPS)
    masks = {step: _mask(split, shape, 0.3, 1 + step // GAP) for step in (1, 5, 9, 13)}
    expected = oracle.coordinates(w, gradients, masks, _settings({"state": state}))
    _check(w, gradients, expected, split=split, density=0.3, state=state)


@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("split", ["columns", "rows", "randk"])
def test_rules(split: str, full: str, free: str) -> None:
    shape = SHAPES[0]
    w, gradients = problem(shape, STEPS)
    masks = {step: _mask(split, shape, 0.5, 1 + step // GAP) for step in (1, 5, 9, 13)}
    expected = oracle.coordinates(w, gradients, masks, _settings({"full": full, "free": free}))
    _check(w, gradients, expected, split=split, density=0.5, full=full, free=free)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("split", ["columns", "column_blocks", "rows", "randk"])
def test_the_ends_are_sign_sgd_and_the_plain_rule(split: str, density: float, shape: tuple[int, int]) -> None:
    w, gradients = problem(shape, STEPS)
    masks = {step: np.full(shape, density == 1) for step in (1, 5, 9, 13)}
    expected = oracle.coordinates(w, gradients, masks, _settings({}))
    _check(w, gradients, expected, split=split, density=density)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("split", "axis"), [("columns", 1), ("rows", 0)])
@pytest.mark.parametrize("state", ["reset", "carry"])
def test_the_largest_columns_or_rows(state: str, split: str, axis: int, shape: tuple[int, int]) -> None:
    w, gradients = problem(shape, STEPS)
    k = round(shape[axis] * 0.3)
    masks = {step: oracle.top_mask(gradients, step, k, axis, MEMORY) for step in (1, 5, 9, 13)}
    assert any((masks[5] != masks[step]).any() for step in (1, 9, 13)), "the choice must move to test anything"
    expected = oracle.coordinates(w, gradients, masks, _settings({"state": state}))
    _check(w, gradients, expected, split=split, density=0.3, state=state, select="top")


def test_the_largest_blocks() -> None:
    shape = (6, 18)
    w, gradients = problem(shape, 1)
    norms = [(gradients[0][:, start : start + BLOCK] ** 2).sum() for start in range(0, 18, BLOCK)]
    mask = np.zeros(shape, dtype=bool)
    for block in np.argsort(norms)[-2:]:
        mask[:, block * BLOCK : (block + 1) * BLOCK] = True
    expected = oracle.coordinates(w, gradients, {1: mask}, _settings({}))
    _check(w, gradients, expected, split="column_blocks", density=0.4, select="top")


@pytest.mark.parametrize("state", ["reset", "project", "carry"])
def test_density_falls_at_refreshes(state: str) -> None:
    shape = (6, 20)
    w, gradients = problem(shape, STEPS)
    # From 0.5 to 0.1 in ten steps: 0.5 at step 1, 0.34 at 5, 0.18 at 9, 0.1 at 13.
    masks = {
        step: _mask("columns", shape, density, 1 + step // GAP)
        for step, density in {1: 0.5, 5: 0.34, 9: 0.18, 13: 0.1}.items()
    }
    assert [int(mask[0].sum()) for mask in masks.values()] == [10, 7, 4, 2]
    expected = oracle.coordinates(w, gradients, masks, _settings({"state": state}))
    _check(w, gradients, expected, split="columns", density=0.5, density_end=0.1, decay_steps=10, state=state)


def test_refreshes_can_be_staggered() -> None:
    start, gradients = zip(*(problem((6, 20), STEPS, seed) for seed in range(3)), strict=True)
    rows = [[gradients[i][step] for i in range(3)] for step in range(STEPS)]
    settings = COMMON | {"update_gap": GAP, "stagger": True, "split": "columns"}
    parameters, optimizer = run(lambda ps: Frugal(ps, **settings), start, rows)
    for place, p in enumerate(parameters):
        steps = [1, *range(1 + place if place else 1 + GAP, STEPS + 1, GAP)]
        masks = {}
        for refresh, step in enumerate(steps, start=1):
            masks[step] = np.zeros((6, 20), dtype=bool)
            order = keyed.permutation(20, keyed.key(0, SUBSET, place, 0, refresh)).tolist()
            masks[step][:, order[:5]] = True
        expected = oracle.coordinates(start[place], gradients[place], masks, _settings({}))
        assert np.abs(p.detach().numpy() - expected).max() <= 1e-9
        assert int(optimizer.state[p]["refreshes"]) == len(steps)


SIDES = {
    "std": lambda shape: "right" if shape[0] >= shape[1] else "left",
    "reverse": lambda shape: "left" if shape[0] >= shape[1] else "right",
    "left": lambda shape: "left",
    "right": lambda shape: "right",
    "full": lambda shape: "full",
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("split", "state"), [*itertools.product(("svd", "random"), ("reset", "keep", "project"))])
def test_projections(split: str, state: str, side: str, shape: tuple[int, int]) -> None:
    w, gradients = problem(shape, STEPS)
    actual = SIDES[side](shape)
    rank = round({"right": shape[1], "left": shape[0], "full": min(shape)}[actual] * 0.3)
    rank = min(rank, *shape) if split == "svd" else rank
    # At a refresh a full projection holds singular values on its diagonal and rounding elsewhere, which eps must hide.
    eps = 1e-4 if side == "full" else 1e-8
    settings = COMMON | {"split": split, "state": state, "side": side, "density": 0.3, "update_gap": GAP, "eps": eps}
    bases: dict[int, tuple[Any, Any]] = {}

    def keep(step: int, optimizer: torch.optim.Optimizer, parameters: list[Any]) -> None:
        if (step - 1) % GAP:
            return
        state = optimizer.state[parameters[0]]
        found = tuple(
            state[name].numpy().copy() if name in state else np.eye(size)
            for name, size in zip(("left", "right"), shape, strict=True)
        )
        if split == "svd":
            # Found anew, and compared as projectors: the vectors of a subspace are not unique.
            left, right = oracle.leading(gradients[step - 1], actual, rank)
            for own, theirs in ((found[0], left), (found[1].T, right.T)):
                assert np.abs(own @ own.T - theirs @ theirs.T).max() <= 1e-9
        else:
            for own, name in ((found[0], "left"), (found[1].T, "right")):
                assert own.shape[1] == (rank if actual in (name, "full") else own.shape[0])
                assert np.abs(own.T @ own - np.eye(own.shape[1])).max() <= 1e-12
        bases[step] = (found[0], found[1])

    (p,), _ = run(lambda ps: Frugal(ps, **settings), [w], [[g] for g in gradients], each=keep)
    expected, certain = oracle.projections(w, gradients, bases, _settings({"state": state, "eps": eps}))
    assert certain.mean() > 0.95 or rank == min(shape), "the signs of a residual that is zero are rounding"
    assert np.abs(p.detach().numpy() - expected)[certain].max(initial=0) <= 1e-9


@pytest.mark.parametrize("split", ["svd", "random"])
def test_a_whole_basis_leaves_no_residual(split: str) -> None:
    w, gradients = problem((12, 8), STEPS)
    ends = []
    for free in ("sign", "none"):
        settings = COMMON | {"split": split, "density": 1.0, "free": free, "update_gap": GAP}
        (p,), _ = run(lambda ps, s=settings: Frugal(ps, **s), [w], [[g] for g in gradients])
        ends.append(p)
    assert torch.equal(*ends)


@pytest.mark.parametrize("full", ["lion", "sgdm"])
@pytest.mark.parametrize("free", ["sgd", "none"])
def test_projections_with_other_rules(full: str, free: str) -> None:
    w, gradients = problem((12, 20), STEPS)
    bases = {step: oracle.leading(gradients[step - 1], "left", 4) for step in (1, 5, 9, 13)}
    expected, _ = oracle.projections(w, gradients, bases, _settings({"full": full, "free": free}))
    _check(w, gradients, expected, split="svd", density=0.3, full=full, free=free)


ORDERS = {
    "ascending": [{0, 1}, {2, 3}, {4, 0}, {1, 2}],
    "descending": [{4, 3}, {2, 1}, {0, 4}, {3, 2}],
    "mirror": [{0, 4}, {1, 3}, {0, 4}, {1, 3}],
}


@pytest.mark.parametrize("order", [*ORDERS, "random"])
def test_blocks(order: str) -> None:
    shapes = [*SHAPES, (7,)]
    start, gradients = zip(*(problem(shape, STEPS, seed) for seed, shape in enumerate(shapes)), strict=True)
    rows = [[gradients[i][step] for i in range(5)] for step in range(STEPS)]
    seen: list[set[int]] = []

    def keep(step: int, optimizer: torch.optim.Optimizer, parameters: list[Any]) -> None:
        if (step - 1) % GAP == 0:
            seen.append({i for i in range(5) if "exp_avg" in optimizer.state[parameters[i]]})

    settings = COMMON | {"update_gap": GAP, "split": "block", "order": order, "density": 0.4}
    parameters, _ = run(lambda ps: Frugal(ps, **settings), start, rows, each=keep)
    assert seen == ORDERS.get(order, seen)
    assert {len(active) for active in seen} == {2}
    if order == "random":
        assert len({frozenset(active) for active in seen}) > 1
    for i, (p, shape) in enumerate(zip(parameters, shapes, strict=True)):
        masks = {step: np.full(shape, i in seen[step // GAP]) for step in (1, 5, 9, 13)}
        wanted = oracle.coordinates(start[i], gradients[i], masks, _settings({}))
        assert np.abs(p.detach().numpy() - wanted).max() <= 1e-9


@pytest.mark.parametrize("full", ["adamw", "lion", "sgdm"])
def test_vectors_and_full_groups_have_the_plain_rule(full: str) -> None:
    shapes = [(7,), (5, 6)]
    start, gradients = zip(*(problem(shape, STEPS) for shape in shapes), strict=True)
    rows = [[gradients[i][step] for i in range(2)] for step in range(STEPS)]

    def make(ps: list[Any]) -> Frugal:
        return Frugal([{"params": ps[:1]}, {"params": ps[1:], "role": "full"}], full=full, update_gap=GAP, **COMMON)

    parameters, _ = run(make, start, rows)
    settings = _settings({"full": full, "lr_scale": 1.0})
    for i, p in enumerate(parameters):
        expected = oracle.coordinates(start[i], gradients[i], {1: np.full(shapes[i], True)}, settings)
        assert np.abs(p.detach().numpy() - expected).max() <= 1e-9


def test_convolutions_and_stacks_are_matrices() -> None:
    shapes = [(6, 4, 3, 3), (3, 6, 20)]
    start, gradients = zip(*(problem(shape, STEPS) for shape in shapes), strict=True)
    rows = [[gradients[i][step] for i in range(2)] for step in range(STEPS)]
    settings = COMMON | {"update_gap": GAP, "split": "columns"}
    (kernel, experts), optimizer = run(lambda ps: Frugal(ps, **settings), start, rows)

    def expected(w: Any, g: list[Any], place: int, part: int) -> Any:
        masks = {}
        for step in (1, 5, 9, 13):
            masks[step] = np.zeros(w.shape, dtype=bool)
            order = keyed.permutation(w.shape[1], keyed.key(0, SUBSET, place, part, 1 + step // GAP)).tolist()
            masks[step][:, order[: round(w.shape[1] / 4)]] = True
        return oracle.coordinates(w, g, masks, _settings({}))

    flat = expected(start[0].reshape(6, 36), [g.reshape(6, 36) for g in gradients[0]], 0, 0)
    assert np.abs(kernel.detach().numpy().reshape(6, 36) - flat).max() <= 1e-9
    assert optimizer.state[kernel]["exp_avg"].shape == (6, 9)
    for part in range(3):
        one = expected(start[1][part], [g[part] for g in gradients[1]], 1, part)
        assert np.abs(experts[part].detach().numpy() - one).max() <= 1e-9
    assert optimizer.state[experts]["exp_avg"].shape == (3, 6, 5)


def test_the_published_order_of_operations_rounds_down() -> None:
    shape = (6, 49)
    w, gradients = problem(shape, STEPS)
    density = 8 / 49
    masks = {
        floor: {step: _mask("columns", shape, density, 1 + step // GAP, floor=floor) for step in (1, 5, 9, 13)}
        for floor in (True, False)
    }
    assert (int(masks[True][1][0].sum()), int(masks[False][1][0].sum())) == (7, 8)
    for floor in (True, False):
        expected = oracle.coordinates(w, gradients, masks[floor], _settings({}))
        _check(w, gradients, expected, split="columns", density=density, compat="official" if floor else None)
