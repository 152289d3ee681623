"""The choice of kernels is a table; the 8-bit product is exact but for the rounding of its input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from core.models.load import load
from core.models.quant import int8, kernels
from core.models.quant.convert import quantise_model
from core.models.quant.kernels import EXACT, INT8, TABLES, choose
from core.models.quant.linear import QuantLinear
from tests.oracles import quantised as oracle
from tests.unit.core.models.quant.parts import arrays, layer

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77]])
PARTS: list[tuple[int, int, dict[str, bool]]] = [
    (128, 32, {}),
    (100, 32, {"zeros": True}),
    (70, 32, {"zeros": True, "constants": True, "order": True}),
    (64, 64, {"constants": True}),
]


def _whole(inputs: int, group: int, first: int, **which: bool) -> QuantLinear:
    """A layer whose levels are whole numbers from ``first`` on."""
    made = layer(inputs, group, **which)
    made.table.copy_(torch.arange(16.0) + first)
    made.pairs.copy_(torch.stack((made.table.repeat(16), made.table.repeat_interleave(16)), 1))
    return made


def _rounded(x: torch.Tensor) -> Any:
    """x as 8 bits a row see it, in float64."""
    step = x.abs().amax(1, keepdim=True) / 127
    return ((x / step).round() * step.double()).numpy()


@pytest.mark.parametrize("first", [-8, 0])
@pytest.mark.parametrize(("inputs", "group", "which"), PARTS)
def test_only_the_rounding_of_the_input_separates_it_from_the_definition(
    inputs: int, group: int, which: dict[str, bool], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_ROWS", 3)
    made = _whole(inputs, group, first, **which)
    x = torch.randn(2, 5, inputs, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 5)[:, None]
    weights, _, _ = oracle.matrix(arrays(made), inputs, group)
    flat = x.view(10, inputs)
    wanted = _rounded(flat) @ weights.T
    assert int8.possible(made)
    y = int8.product(x, made, int8.Packed())
    assert y.shape == (2, 5, 9) and y.dtype == torch.float32
    size = np.abs(_rounded(flat)) @ np.abs(weights.T)
    assert (np.abs(y.view(10, 9).numpy() - wanted) <= 2e-6 * size + 1e-30).all()
    exact = flat.double().numpy() @ weights.T
    assert np.linalg.norm(wanted[2] - exact[2]) < 0.02 * np.linalg.norm(exact[2])


def test_a_millionth_of_a_scale_counts() -> None:
    made, packed = _whole(64, 32, -8), int8.Packed()
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = int8.product(x, made, packed)
        made.scales.mul_(1 + 2**-20)
        after = int8.product(x, made, packed)
    ratio = (after.double() / before.double() - 1)[before.abs() > before.abs().median()]
    assert ((ratio - 2**-20).abs() < 5e-7).all() and (after != before).float().mean() > 0.9


def test_other_codes_are_packed_anew() -> None:
    made, packed = _whole(64, 32, -8), int8.Packed()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    before = int8.product(x, made, packed)
    made.load_state_dict({**made.state_dict(), "codes": made.codes ^ 1})
    after = int8.product(x, made, packed)
    assert not torch.equal(after, before) and torch.equal(after, int8.product(x, made, int8.Packed()))


def test_rows_without_numbers_stay_so_and_leave_the_others_alone() -> None:
    made, packed = _whole(64, 32, 0, zeros=True), int8.Packed()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    wanted = int8.product(x, made, packed)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("inf"), 0
    y = int8.product(x, made, packed)
    assert not torch.isfinite(y[:2]).any() and not y[2].any() and torch.equal(y[3], wanted[3])


def test_the_choice_is_a_function_of_the_table_device_dtype_and_shape() -> None:
    def chosen(table: str = INT8, **other: Any) -> str:
        shape: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "tokens": 1024, "outputs": 576, "group": 64}
        return choose(table, **shape | other)

    assert chosen() == "int8" and chosen(EXACT) == "reference"
    assert chosen(device="cuda") == "reference" and chosen(dtype=torch.bfloat16) == "reference"
    assert chosen(outputs=192) == "reference"
    assert chosen(tokens=64) == "reference" and chosen(tokens=64, outputs=1536) == "int8"
    assert chosen(group=32, tokens=256) == "reference" and chosen(group=128, tokens=16) == "int8"
    assert set(TABLES) == {EXACT, INT8} and TABLES[EXACT] == ()


def test_layers_multiply_by_the_table_until_a_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("tiny-llama").model.requires_grad_(False)
    layers = quantise_model(model, "int4")
    exact, state = model(IDS).logits, set(model.state_dict())
    monkeypatch.setattr(kernels, "TABLES", {EXACT: (), INT8: ((64, 64, 4),)})
    assert kernels.use(layers, INT8) == 14
    rounded = model(IDS).logits
    assert not torch.equal(rounded, exact) and (rounded - exact).norm() < 0.05 * exact.norm()
    assert set(model.state_dict()) == state
    assert torch.equal(copy.deepcopy(model)(IDS).logits, rounded)
    short = model(IDS[:, :3]).logits  # fewer tokens than the table asks for
    for one in layers.values():
        one.scales.requires_grad_()
    assert torch.equal(model(IDS).logits, exact)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, rounded)
    assert kernels.use(layers, EXACT) == 0 and torch.equal(model(IDS).logits, exact)
    assert torch.equal(model(IDS[:, :3]).logits, short)


def test_tables_that_there_are_not_or_that_do_nothing_are_refused() -> None:
    model = load("tiny-llama").model
    layers = quantise_model(model, "nf4")
    with pytest.raises(ValueError, match="give exact-1 or int8-1"):
        kernels.use(layers, "int8-2")
    with pytest.raises(ValueError, match="whole numbers: quantise with int4"):
        kernels.use(layers, INT8)
