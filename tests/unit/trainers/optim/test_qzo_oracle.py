"""Zeroth-order steps equal NumPy's, element for element and bit for bit, in both modes and all dtypes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.trainers.optim.oracles.qzo import Official, Oracle
from trainers.optim import Qzo
from trainers.optim.estimator import OFFICIAL

SHAPES = ((7, 5), (33,), (3, 4, 2), (130,))
STEPS = 32


def _start(dtype: Any, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    return [(draw.random(shape) * 0.01 + 0.001).astype(dtype) for shape in SHAPES]


def loss(tensors: list[np.ndarray[Any, Any]]) -> float:
    """No quadratic, in float64, so that both sides see the same number for the same bits."""
    flat = np.concatenate([t.astype(np.float64).reshape(-1) for t in tensors])
    targets = np.linspace(-0.02, 0.03, flat.size)
    return float(np.sum(np.sin(40 * (flat - targets)) ** 2) + 3 * np.sum(flat) ** 2) / 50


def _arrays(optimizer: Qzo) -> list[np.ndarray[Any, Any]]:
    return [p.detach().numpy().copy() for p in optimizer.parameters]


def _ours(start: list[np.ndarray[Any, Any]], kinds: list[bool], decay: list[float], **settings: Any) -> Qzo:
    groups = [
        {"params": [torch.nn.Parameter(torch.from_numpy(t.copy()))], "scales": kind, "weight_decay": wd}
        for t, kind, wd in zip(start, kinds, decay, strict=True)
    ]
    return Qzo(groups, **settings)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"eps_rel": 0.02, "noise": "rademacher"},
    {"per": "tensor"},
    {"per": "element"},
    {"samples": 3},
    {"sides": 1},
    {"sides": 1, "samples": 2, "noise": "rademacher"},
    {"clip": 5.0},
    {"clip_quantile": 0.7, "window": 25},
    {"normalise": True, "clip": 1.5, "window": 10},
    {"normalise": True, "clip_quantile": 0.8, "per": "element", "samples": 2},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_steps_are_those_of_the_oracle(variant: dict[str, Any], dtype: Any) -> None:
    start, kinds, decay = _start(dtype), [True, True, False, False], [0.0, 0.0, 0.1, 0.0]
    start[0][2, 3] = 0.0
    start[0][1, 1] = -0.004
    rate = 3e-2 if variant.get("normalise") else 1e-4
    optimizer = _ours(start, kinds, decay, lr=rate, seed=9, **{"clip_quantile": 1.0, **variant})
    oracle = Oracle(start, kinds, decay, 9, **variant)
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - number / STEPS)
        optimizer.step(lambda: loss(_arrays(optimizer)))
        oracle.step(loss, rate * (1 - number / STEPS))
        for ours, theirs in zip(_arrays(optimizer), oracle.tensors, strict=True):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), number
    assert optimizer.epsilon == oracle.epsilon
    assert not np.array_equal(oracle.tensors[1], start[1])
    assert oracle.tensors[0][2, 3] == 0, "a scale of zero stays zero"
    assert loss(oracle.tensors) < loss(start)
    if "clip" in variant or "clip_quantile" in variant:
        assert 0 < optimizer.clipped < STEPS * variant.get("samples", 1)


def test_a_run_in_float32_stays_close_to_one_in_float64() -> None:
    start = _start(np.float32)
    optimizer = _ours(start, [True] * 4, [0.0] * 4, lr=1e-4, seed=9, clip_quantile=1.0)
    oracle = Oracle([t.astype(np.float64) for t in start], [True] * 4, [0.0] * 4, 9)
    for _ in range(STEPS):
        optimizer.step(lambda: loss(_arrays(optimizer)))
        oracle.step(loss, 1e-4)
    for ours, theirs, before in zip(_arrays(optimizer), oracle.tensors, start, strict=True):
        # Rounding t + e u to 24 bits moves each point by 3e-8 of t, which is 1e-4 of e u.
        assert np.linalg.norm(ours - theirs) < 2e-3 * np.linalg.norm(theirs - before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("clip", [100.0, 0.5, None])
def test_official_steps_are_those_of_the_published_algorithm(dtype: Any, clip: float | None) -> None:
    start = _start(dtype)
    start[3] *= dtype(0.01)
    # Scales come first among our parameters, and last in the published order.
    kinds, decay = [True, False, False, True], [0.0, 0.01, 0.0, 0.0]
    seeds = np.random.RandomState(42)
    rate = 1e-5
    settings = {**OFFICIAL, "clip": clip}
    optimizer = _ours(start, kinds, decay, lr=rate, seeds=lambda: int(seeds.randint(1_000_000_000)), **settings)
    theirs = np.random.RandomState(42)
    oracle = Official(
        [start[1].copy(), start[2].copy()],
        [0.01, 0.0],
        [start[0].copy(), start[3].copy()],
        lambda: int(theirs.randint(1_000_000_000)),
        clip=clip,
    )

    def by_kind(weights: list[Any], scales: list[Any]) -> float:
        return loss([scales[0], weights[0], weights[1], scales[1]])

    for number in range(STEPS):
        returned = optimizer.step(lambda: loss(_arrays(optimizer)))
        oracle.step(by_kind, rate)
        expected = [oracle.scales[0], *oracle.weights, oracle.scales[1]]
        for ours, published in zip(_arrays(optimizer), expected, strict=True):
            assert ours.dtype == published.dtype
            assert np.array_equal(ours, published), number
    assert math.isfinite(returned)
    assert float(min(oracle.scales[1].min(), oracle.scales[0].min())) >= float(dtype(1e-7)), "clamped"
    assert (optimizer.clipped > 0) == (clip == 0.5)


def test_the_official_mode_logs_the_loss_ahead_and_steps_by_minus_clip_on_nan() -> None:
    start = _start(np.float32)
    records: list[Any] = []
    optimizer = _ours(start, [True] * 4, [0.0] * 4, lr=1e-6, seed=1, **OFFICIAL)
    optimizer.on_step = records.append
    losses = iter([1.5, 2.5, math.nan, 1.0, math.inf, 1.0])
    assert optimizer.step(lambda: next(losses)) == 1.5
    before = _arrays(optimizer)
    optimizer.step(lambda: next(losses))
    optimizer.step(lambda: next(losses))
    assert [record.d_applied for record in records] == [-100.0, -100.0, 100.0]
    assert records[0].d_raw == pytest.approx(-500)
    assert not all(np.array_equal(a, b) for a, b in zip(_arrays(optimizer), before, strict=True))
    assert optimizer.skipped == 2


def test_policies_can_be_switched_one_by_one_in_the_official_mode() -> None:
    start = _start(np.float16)
    exact = _ours(start, [True] * 4, [0.0] * 4, lr=0.0, seed=1, **{**OFFICIAL, "restore": "copy", "nan": "skip"})
    drifts = _ours(start, [True] * 4, [0.0] * 4, lr=0.0, seed=1, **OFFICIAL)
    for optimizer in (exact, drifts):
        optimizer.step(lambda: 1.0)
    assert all(np.array_equal(a, b) for a, b in zip(_arrays(exact), start, strict=True))
    moved = np.concatenate([(a != b).reshape(-1) for a, b in zip(_arrays(drifts), start, strict=True)])
    assert 0.2 < moved.mean() < 0.7, "the published cycle leaves many scales of 16 bits elsewhere"
    values = iter([math.nan, 1.0])
    exact.param_groups[0]["lr"] = exact.param_groups[1]["lr"] = 1e-3
    for group in exact.param_groups:
        group["lr"] = 1e-3
    exact.step(lambda: next(values))
    assert all(np.array_equal(a, b) for a, b in zip(_arrays(exact), start, strict=True))


def test_private_draws_leave_the_global_generator_alone() -> None:
    optimizer = _ours(_start(np.float32), [True] * 4, [0.0] * 4, lr=1e-6, **OFFICIAL)
    before = torch.get_rng_state()
    optimizer.step(lambda: 1.0)
    assert torch.equal(torch.get_rng_state(), before)
