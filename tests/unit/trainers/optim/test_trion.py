"""Trion against a float64 oracle, and the properties that define it; without a process group."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.checkpoint import flatten_optimizer, unflatten_optimizer
from tests.unit.trainers.optim.oracles import bases, dct_adamw, trion
from tests.unit.trainers.optim.projected_helpers import SHAPES, STEPS, follow, gradients, matrices, nbytes, start
from trainers.optim import Trion
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
    "decay": {"weight_decay": 0.1, "momentum": 0.8},
    "scheduled": {"coefficients": "scheduled"},
    "none": {"scale": "none"},
    "kimi": {"scale": "kimi"},
    "dion": {"scale": "dion"},
    "random": {"basis": "random"},
    "hadamard": {"basis": "hadamard"},
    "identity": {"basis": "identity"},
    "reverse": {"side": "reverse"},
    "all": {"rank": 1000},
}


def _run(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[nn.Parameter, Any]:
    weight = start(shape, dtype)
    optimizer = Trion([weight], **{"rank": 4} | settings)
    follow(optimizer, [{weight: g} for g in gradients(shape)])
    return weight, optimizer


def _oracle(shape: tuple[int, ...], **settings: Any) -> tuple[np.ndarray, list[list[list[int]]]]:
    options = {"rank": 4} | settings
    basis, side = BASES[options.pop("basis", "dct")], options.pop("side", "std")
    options.pop("transform", None)
    if options.pop("coefficients", "") == "scheduled":
        options["coefficients"] = trion.KERNEL
    weight, grads = start(shape).detach(), gradients(shape)
    if weight.dim() == 1:
        decay = options.get("weight_decay", 0.0)
        adam: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": decay}
        return dct_adamw.adamw(weight.numpy(), [g.numpy() for g in grads], **adam), []
    done, chosen = [], []
    for number, matrix in enumerate(matrices(weight)):
        right = (matrix.shape[0] >= matrix.shape[1]) == (side == "std")
        own = [matrices(g)[number].numpy() for g in grads]
        final, _, history = trion.run(matrix.numpy(), own, basis=basis, right=right, **options)
        done.append(final)
        chosen.append(history)
    return np.stack(done).reshape(shape), chosen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_oracle(variant: str, shape: tuple[int, ...]) -> None:
    weight, _ = _run(shape, **VARIANTS[variant])
    wanted, _ = _oracle(shape, **VARIANTS[variant])
    assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9


@pytest.mark.parametrize("shape", list(SHAPES.values())[:3], ids=list(SHAPES)[:3])
@pytest.mark.parametrize(("wanted_dtype", "limit"), [("weights", 1e-5), ("bfloat16", 2e-2)])
def test_lower_precision_follows_given_the_same_choices(
    wanted_dtype: str, limit: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, chosen = _oracle(shape)
    choices = iter(chosen[0])
    monkeypatch.setattr("trainers.optim.trion.choose", lambda *_: torch.tensor(next(choices)))
    weight, _ = _run(shape, dtype=torch.float32, newton_schulz_dtype=wanted_dtype)
    error = np.linalg.norm(weight.detach().double().numpy() - wanted)
    assert error <= limit * np.linalg.norm(wanted - start(shape).detach().numpy())


def test_the_update_is_orthogonal_and_in_the_chosen_subspace() -> None:
    shape, r = (40, 16), 6
    weight = start(shape)
    before = weight.detach().clone()
    optimizer = Trion([weight], lr=1.0, rank=r, scale="none", coefficients="scheduled")
    (gradient,) = gradients(shape, steps=1)
    follow(optimizer, [{weight: gradient}])
    values = torch.linalg.svdvals(weight.detach() - before)
    assert float((values[:r] - 1).abs().max()) < 0.05
    assert float(values[r:].max()) < 1e-12
    coordinates = gradient @ build("dct", 16).T
    chosen = coordinates.abs().sum(0).sort(descending=True).indices[:r]
    projector = build("dct", 16)[chosen].T @ build("dct", 16)[chosen]
    moved = weight.detach() - before
    assert torch.allclose(moved @ projector, moved, atol=1e-12)


def test_what_is_not_chosen_stays_whole_in_the_momentum() -> None:
    shape, r = (40, 16), 6
    weight = start(shape)
    optimizer = Trion([weight], rank=r, momentum=0.25, norm=2)
    (gradient,) = gradients(shape, steps=1)
    follow(optimizer, [{weight: gradient}])
    before, after = (m @ build("dct", 16).T for m in (gradient, optimizer.state[weight]["momentum_buffer"]))
    share = (after / before).mean(0)
    chosen = set(before.square().sum(0).sort(descending=True).indices[:r].tolist())
    for k in range(16):
        assert float(share[k]) == pytest.approx(0.25 if k in chosen else 1.0, abs=1e-9)


def test_state_is_the_momentum_alone() -> None:
    weight, optimizer = _run((96, 64), dtype=torch.float32)
    assert nbytes(optimizer) == 4 * 96 * 64 + 4
    assert set(optimizer.state[weight]) == {"step", "momentum_buffer"}


@pytest.mark.parametrize("variant", [*VARIANTS, "bfloat16"])
def test_saved_and_loaded_is_never_interrupted(variant: str) -> None:
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    shapes = list(SHAPES.values())
    steps = [[gradients(shape)[t] for shape in shapes] for t in range(STEPS)]
    settings = {"rank": 4} | VARIANTS.get(variant, {})

    def go(weights: list[nn.Parameter], optimizer: Trion, some: slice) -> None:
        follow(optimizer, [dict(zip(weights, grads, strict=True)) for grads in steps[some]])

    straight = [start(shape, dtype) for shape in shapes]
    go(straight, Trion(straight, **settings), slice(STEPS))
    weights = [start(shape, dtype) for shape in shapes]
    optimizer = Trion(weights, **settings)
    go(weights, optimizer, slice(6))
    tensors, values = flatten_optimizer(optimizer.state_dict())
    again = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = Trion(again, **settings)
    resumed.load_state_dict(unflatten_optimizer(tensors, json.loads(json.dumps(values))))
    go(again, resumed, slice(6, STEPS))
    assert all(torch.equal(one, other) for one, other in zip(straight, again, strict=True))


def test_vectors_and_full_groups_are_adamw_at_a_rate_of_their_own() -> None:
    matrix, vector, embedding = start((8, 6)), start((5,)), start((9, 4))
    optimizer = Trion(
        [{"params": [matrix, vector], "names": ["m", "v"]}, {"params": [embedding], "role": "full"}], adam_lr=1e-3
    )
    assert [(g.get("role"), g["lr"], g.get("names")) for g in optimizer.param_groups] == [
        (None, 0.02, ["m"]),
        ("full", 1e-3, ["v"]),
        ("full", 1e-3, None),
    ]
    for weight in (vector, embedding):
        grads = gradients(weight.shape)
        begun = weight.detach().clone()
        follow(optimizer, [{weight: g} for g in grads])
        adam: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        wanted = dct_adamw.adamw(begun.numpy(), [g.numpy() for g in grads], **adam)
        assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9


def test_named_parameters_keep_their_names() -> None:
    model = nn.Linear(4, 6)
    optimizer = Trion(model.named_parameters())
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


def test_two_runs_are_bitwise_equal() -> None:
    one, other = (_run((40, 24), dtype=torch.bfloat16)[0] for _ in range(2))
    assert torch.equal(one, other)


def test_converges_on_a_toy_problem() -> None:
    draw = torch.Generator().manual_seed(1)
    goal = torch.randn(24, 2, generator=draw) @ torch.randn(2, 16, generator=draw)
    weight = nn.Parameter(torch.zeros(24, 16))
    optimizer = Trion([weight], rank=4)
    losses = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.4 * (1 - step / 300)
        optimizer.zero_grad()
        loss = (weight - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


def test_steps_on_the_meta_device() -> None:
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(shape)) for shape in ((300, 200), (200, 300), (4, 20, 30), (7,))]
    for settings in VARIANTS.values():
        optimizer = Trion(weights, **{"rank": 16} | settings)
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        assert optimizer.state[weights[0]]["momentum_buffer"].device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"steps": 6}, "steps must be in 1 to 5"),
        ({"scale": "half"}, "scale must be one of kj, none, kimi, dion"),
        ({"coefficients": "new"}, "coefficients must be one of"),
        ({"newton_schulz_dtype": "int8"}, "newton_schulz_dtype must be one of"),
        ({"adam_betas": (1.0, 0.9)}, "adam_betas"),
        ({"adam_lr": -1.0}, "adam_lr"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trion([start((4, 4))], **settings)
