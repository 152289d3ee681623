"""DCT-AdamW against a float64 oracle, bit for bit where that is claimed, and the property that defines it."""

from __future__ import annotations

import copy
import io
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.checkpoint import flatten_optimizer, unflatten_optimizer
from tests.unit.trainers.optim.oracles import bases, dct_adamw
from tests.unit.trainers.optim.projected_helpers import SHAPES, STEPS, follow, gradients, matrices, nbytes, start
from trainers.optim import DctAdamW, release_gradients
from trainers.optim.bases import build

BASES: dict[str, Any] = {
    "dct": bases.cosines,
    "hadamard": bases.hadamard,
    "identity": bases.identity,
    "random": lambda n: build("random", n).numpy(),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2": {"norm": 2},
    "fft": {"transform": "fft"},
    "fft l2 gap": {"transform": "fft", "norm": 2, "update_gap": 3},
    "gap": {"update_gap": 4},
    "unturned": {"rotate": False, "update_gap": 2},
    "feedback": {"feedback": "full"},
    "feedback 8": {"feedback": "8bit", "update_gap": 2},
    "feedback 4": {"feedback": "4bit", "transform": "fft"},
    "ages": {"ages": True},
    "hysteresis": {"hysteresis": 0.3, "ages": True, "feedback": "full"},
    "random": {"basis": "random"},
    "hadamard": {"basis": "hadamard", "feedback": "8bit"},
    "identity": {"basis": "identity", "norm": 2, "feedback": "8bit"},
    "identity gap": {"basis": "identity", "update_gap": 3, "weight_decay": 0.0},
    "left": {"side": "left"},
    "right": {"side": "right"},
    "reverse": {"side": "reverse"},
    "all": {"rank": 1000},
    "adam": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "lr": 0.02},
}


def _run(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[nn.Parameter, Any]:
    weight = start(shape, dtype)
    optimizer = DctAdamW([weight], **{"lr": 1e-2, "rank": 4} | settings)
    follow(optimizer, [{weight: g} for g in gradients(shape)])
    return weight, optimizer


def _oracle(shape: tuple[int, ...], **settings: Any) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Final weights, and what each of its matrices kept in every step."""
    options = {"lr": 1e-2, "rank": 4} | settings
    basis, side = BASES[options.pop("basis", "dct")], options.pop("side", "std")
    options.pop("transform", None)
    weight, grads = start(shape).detach(), gradients(shape)
    if weight.dim() == 1:
        adam = {name: options[name] for name in ("lr", "betas", "eps", "weight_decay") if name in options}
        adam = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01} | adam
        return dct_adamw.adamw(weight.numpy(), [g.numpy() for g in grads], **adam), []
    done, kept = [], []
    for number, matrix in enumerate(matrices(weight)):
        tall = matrix.shape[0] >= matrix.shape[1]
        right = {"std": tall, "reverse": not tall, "left": False, "right": True}[side]
        own = [matrices(g)[number].numpy() for g in grads]
        final, history = dct_adamw.run(matrix.numpy(), own, basis=basis, right=right, **options)
        done.append(final)
        kept.append(history)
    return np.stack(done).reshape(shape), kept


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_oracle(variant: str, shape: tuple[int, ...]) -> None:
    settings = VARIANTS[variant]
    weight, optimizer = _run(shape, **settings)
    wanted, kept = _oracle(shape, **settings)
    assert STEPS >= 13
    assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9
    if kept:
        index = optimizer.state[weight]["index"].reshape(len(kept), -1)
        assert index.tolist() == [history[-1] for history in kept]
        if "rank" not in settings:
            changes = sum(a != b for history in kept for a, b in pairwise(history))
            assert changes, "the choice never changed: this would test no rotation"


@pytest.mark.parametrize("shape", [(70, 20), (20, 70)])
@pytest.mark.parametrize("variant", ["plain", "fft l2 gap", "feedback 8", "feedback 4", "identity", "identity gap"])
def test_equals_the_oracle_in_several_tiles(
    variant: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tile is 16 rows then: five tiles, the last one short. The way back is by FFT whatever the rank.
    monkeypatch.setattr("trainers.optim.transform._TILE", 1)
    monkeypatch.setattr("trainers.optim.transform._SPAN_FROM", {("cpu", torch.float64): 1})
    weight, _ = _run(shape, **VARIANTS[variant])
    wanted, _ = _oracle(shape, **VARIANTS[variant])
    assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9


@pytest.mark.parametrize("shape", list(SHAPES.values())[:3], ids=list(SHAPES)[:3])
@pytest.mark.parametrize("variant", ["plain", "fft l2 gap", "feedback", "feedback 8", "ages", "identity"])
def test_float32_follows_given_the_same_choices(
    variant: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = VARIANTS[variant]
    wanted, kept = _oracle(shape, **settings)
    gap = settings.get("update_gap", 1)
    chosen = iter(k for t, k in enumerate(kept[0], start=1) if t == 1 or t % gap == 0)
    monkeypatch.setattr("trainers.optim.dct_adamw.choose", lambda *_: torch.tensor(next(chosen)))
    weight, _ = _run(shape, dtype=torch.float32, **settings)
    begun = start(shape).detach().numpy()
    error = np.linalg.norm(weight.detach().double().numpy() - wanted)
    # A code of the quantised residual that falls on the other side of a half is a whole level away.
    limit = 1e-5 if "8" not in variant else 2e-4
    assert error <= limit * np.linalg.norm(wanted - begun)


def test_both_transforms_train_the_same_weights() -> None:
    one, other = (_run((20, 12), transform=transform)[0] for transform in ("matmul", "fft"))
    assert float((one - other).detach().abs().max()) <= 1e-12


def test_full_rank_in_a_turned_frame_captures_everything() -> None:
    # With every vector kept nothing is left out, so error feedback has nothing to feed back.
    weight, optimizer = _run((20, 12), rank=12, feedback="full")
    assert float(optimizer.state[weight]["error"].abs().max()) <= 1e-13


@pytest.mark.parametrize("basis", BASES)
def test_keeps_the_most_energy_that_any_choice_could(basis: str) -> None:
    shape, r = (30, 16), 5
    weight = start(shape)
    optimizer = DctAdamW([weight], rank=r, basis=basis, norm=2)  # type: ignore[arg-type]
    (gradient,) = gradients(shape, steps=1)
    follow(optimizer, [{weight: gradient}])
    energies = (gradient @ torch.from_numpy(BASES[basis](16)).T).square().sum(0)
    state = optimizer.state[weight]
    # After one step the mean is a tenth of the coordinates.
    kept = float((state["exp_avg"] * 10).square().sum())
    assert kept == pytest.approx(float(energies.sort(descending=True).values[:r].sum()), rel=1e-12)


def test_moves_weights_only_in_the_kept_subspace() -> None:
    shape = (30, 16)
    weight = start(shape)
    before = weight.detach().clone()
    optimizer = DctAdamW([weight], rank=5, weight_decay=0.0)
    follow(optimizer, [{weight: g} for g in gradients(shape, steps=1)])
    vectors = build("dct", 16)[optimizer.state[weight]["index"].long()]
    moved = weight.detach() - before
    assert torch.allclose(moved @ vectors.T @ vectors, moved, atol=1e-14), "subspaces compared as projectors"
    assert float(moved.norm()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"ages": True}, {"feedback": "full"}, {"feedback": "8bit"}, {"feedback": "4bit"}]
)
def test_state_takes_the_bytes_of_the_formula(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    m, n, r = 96, 64, 16
    weight = start((m, n), dtype)
    optimizer = DctAdamW([weight], rank=r, **settings)
    follow(optimizer, [{weight: g} for g in gradients((m, n), steps=2)])
    b = 8 if dtype == torch.float64 else 4
    blocks = math.ceil(n / 256)
    feedback = {"full": m * n * b, "8bit": m * n + 2 * m * blocks * b, "4bit": m * n // 2 + 2 * m * blocks * b}
    wanted = 2 * m * r * b + 4 * r + 4 + (4 * r if "ages" in settings else 0)
    wanted += feedback.get(settings.get("feedback", ""), 0)
    assert nbytes(optimizer) == wanted
    assert not [name for name in optimizer.state[weight] if "basis" in name], "the basis is no state"


@pytest.mark.parametrize("variant", [*VARIANTS, "bfloat16"])
def test_saved_and_loaded_is_never_interrupted(variant: str) -> None:
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    shapes = list(SHAPES.values())
    settings = {"lr": 1e-2, "rank": 4} | VARIANTS.get(variant, {"feedback": "8bit", "ages": True})
    steps = [[gradients(shape)[t] for shape in shapes] for t in range(STEPS)]

    def fresh() -> tuple[list[nn.Parameter], DctAdamW]:
        weights = [start(shape, dtype) for shape in shapes]
        return weights, DctAdamW(weights, **settings)

    def go(weights: list[nn.Parameter], optimizer: DctAdamW, some: slice) -> None:
        follow(optimizer, [dict(zip(weights, grads, strict=True)) for grads in steps[some]])

    straight, whole = fresh()
    go(straight, whole, slice(STEPS))
    for stop in (1, 5, 7):
        weights, optimizer = fresh()
        go(weights, optimizer, slice(stop))
        # Through torch.save with weights_only, and through our own tensors and JSON.
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        tensors, values = flatten_optimizer(loaded)
        state = unflatten_optimizer(tensors, json.loads(json.dumps(values)))
        again = [nn.Parameter(weight.detach().clone()) for weight in weights]
        resumed = DctAdamW(again, **settings)
        resumed.load_state_dict(state)
        go(again, resumed, slice(stop, STEPS))
        for one, other in zip(straight, again, strict=True):
            assert torch.equal(one, other)
            for name, value in whole.state[one].items():
                assert value.dtype == resumed.state[other][name].dtype
                assert torch.equal(value, resumed.state[other][name]), name


def test_two_runs_are_bitwise_equal_and_leave_gradients_and_generators_alone() -> None:
    before = torch.get_rng_state()
    runs = [_run((40, 24), dtype=torch.bfloat16, basis="random", feedback="4bit")[0] for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].grad is not None
    assert torch.equal(runs[0].grad, gradients((40, 24))[-1].bfloat16()), "p.grad is never written to"


def test_settings_may_differ_by_group_and_change_between_steps() -> None:
    shape = (20, 12)
    grads = gradients(shape)
    one, other = start(shape), start(shape)
    optimizer = DctAdamW(
        [{"params": [one], "rank": 3, "betas": (0.5, 0.9)}, {"params": [other], "role": "full"}], lr=1e-2
    )
    follow(optimizer, [{one: g, other: g} for g in grads])
    assert optimizer.state[one]["exp_avg"].shape == (20, 3)
    assert optimizer.state[other]["exp_avg"].shape == shape
    wanted, _ = dct_adamw.run(
        start(shape).detach().numpy(),
        [g.numpy() for g in grads],
        basis=bases.cosines,
        rank=3,
        betas=(0.5, 0.9),
        lr=1e-2,
    )
    assert np.abs(one.detach().numpy() - wanted).max() <= 1e-9
    adam = dct_adamw.adamw(
        start(shape).detach().numpy(),
        [g.numpy() for g in grads],
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
    )
    assert np.abs(other.detach().numpy() - adam).max() <= 1e-9
    optimizer.param_groups[0]["lr"] = 0.0
    held = one.detach().clone()
    follow(optimizer, [{one: grads[0], other: None}])
    assert torch.equal(one, held)


def test_density_is_a_share_of_each_side() -> None:
    one, other = start((20, 12)), start((8, 30))
    optimizer = DctAdamW([one, other], density=0.25)
    follow(optimizer, [{one: gradients((20, 12), steps=1)[0], other: gradients((8, 30), steps=1)[0]}])
    assert optimizer.state[one]["index"].shape == (3,)
    assert optimizer.state[other]["index"].shape == (2,)
    assert optimizer.state[other]["exp_avg"].shape == (30, 2)


def test_weights_that_are_not_contiguous_are_updated() -> None:
    shape = (10, 3, 4, 4)
    plain, turned = start(shape), nn.Parameter(start(shape).detach().to(memory_format=torch.channels_last))
    for weight in (plain, turned):
        follow(DctAdamW([weight], rank=4), [{weight: g} for g in gradients(shape, steps=3)])
    assert not turned.is_contiguous()
    assert torch.allclose(plain, turned, atol=1e-12)


def test_bfloat16_weights_round_without_bias() -> None:
    # A step of 1e-4 on weights near 1 is a fortieth of bfloat16's last place: rounding to nearest would never move.
    weight = nn.Parameter(torch.ones(256, 64, dtype=torch.bfloat16))
    optimizer = DctAdamW([weight], lr=1e-4, rank=64, basis="identity", weight_decay=0.0)
    follow(optimizer, [{weight: torch.ones(256, 64)}] * 40)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 40 * 1e-4, abs=3e-4)
    # Each step draws anew: with the same bits every time some weights would move in all forty steps, others in none.
    assert float(weight.detach().float().std()) < 0.008


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    weight = start((6, 4))
    optimizer = DctAdamW([weight], rank=2)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    loss: Any = optimizer.step(closure)
    assert float(loss.detach()) > 0


def test_finds_a_low_rank_optimum() -> None:
    draw = torch.Generator().manual_seed(1)
    u, v = (torch.randn(size, 2, generator=draw) for size in (24, 16))
    goal = u @ v.T
    # Gap 1 with rank 4 of 16 reaches it because the choice follows the gradient.
    for settings in ({}, {"feedback": "8bit"}, {"basis": "identity"}, {"ages": True, "hysteresis": 0.1}):
        weight = nn.Parameter(torch.zeros(24, 16))
        optimizer = DctAdamW([weight], lr=0.05, rank=4, weight_decay=0.0, **settings)  # type: ignore[arg-type]
        first = last = 0.0
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
            optimizer.zero_grad()
            loss = (weight - goal).square().mean()
            loss.backward()
            optimizer.step()
            first, last = first or float(loss.detach()), float(loss.detach())
        assert last < 0.02 * first, settings


def test_steps_on_the_meta_device() -> None:
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(shape)) for shape in ((300, 200), (200, 300), (4, 20, 30), (7,))]
    for settings in VARIANTS.values():
        optimizer = DctAdamW(weights, **{"rank": 16} | settings)
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        assert optimizer.state[weights[0]]["exp_avg"].device.type == "meta"


def test_a_copy_goes_on_like_the_original() -> None:
    weight, optimizer = _run((20, 12))
    copied, other = copy.deepcopy((weight, optimizer))
    for parameter, own in ((weight, optimizer), (copied, other)):
        follow(own, [{parameter: gradients((20, 12))[0]}])
    assert torch.equal(weight, copied)


def test_steps_inside_the_backward_pass_too() -> None:
    def train(released: bool, **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
        optimizer = DctAdamW(model.parameters(), rank=4, feedback="8bit", **settings)
        if released:
            release_gradients(optimizer)
        for step in range(5):
            rows = torch.randn(9, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()
        return model

    for one, other in zip(train(False).parameters(), train(True).parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="a learned basis needs the gradients of all layers of a type"):
        train(True, basis="learned")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], not 1.5"),
        ({"basis": "haar"}, "basis must be one of dct, random, hadamard, identity, learned, not 'haar'"),
        ({"norm": 3}, "norm must be one of 1, 2, not 3"),
        ({"transform": "fft", "basis": "random"}, "transform fft is for basis dct"),
        ({"compat": "official", "basis": "hadamard"}, "compat official is for basis dct"),
        ({"feedback": "2bit"}, "feedback must be none, full, 8bit or 4bit"),
        ({"ages": True, "rotate": False}, "ages needs rotate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"update_gap": 0}, "update_gap"),
        ({"lr": -1.0}, "lr"),
        ({"hysteresis": -0.1}, "hysteresis"),
        ({"side": "top"}, "side must be one of"),
        ({"basis": "learned", "learn_gap": 3}, "learn_gap"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DctAdamW([start((4, 4))], **settings)
    with pytest.raises(ValueError, match=message):
        DctAdamW([{"params": [start((4, 4))], **settings}])
