"""The quantised layer against its definition in float64: matrix, product, gradients; what stays, what never exists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.models.quant import linear
from core.models.quant.packing import pack, unpack
from tests.oracles import quantised as oracle
from tests.unit.core.models.quant.parts import arrays, layer

CASES: list[tuple[int, int, dict[str, bool]]] = [
    (128, 32, {}),
    (128, 128, {"bias": True}),
    (100, 32, {"zeros": True, "bias": True}),  # the last group is short
    (99, 64, {"constants": True, "zeros": True}),  # and the last byte half used
    (33, 32, {"zeros": True}),  # a last group of one
    (7, 7, {}),  # one odd group
    (96, 32, {"order": True, "bias": True}),
    (70, 32, {"order": True, "zeros": True, "constants": True, "bias": True}),
]


def test_the_first_code_of_a_pair_is_in_the_low_half() -> None:
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    for n in (1, 2, 7, 64):
        codes = torch.randint(0, 16, (5, n), dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes), n), codes)


@pytest.mark.parametrize("tile", [1, 200, 1 << 20])
@pytest.mark.parametrize(("inputs", "group", "which"), CASES)
def test_matrix_product_and_gradients_are_those_of_the_definition(
    inputs: int, group: int, which: dict[str, bool], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TILE", tile)
    made = layer(inputs, group, **which)
    made.scales.requires_grad_()
    weights, levels, owner = oracle.matrix(arrays(made), inputs, group)
    # Each entry takes three roundings of float32.
    np.testing.assert_allclose(made.dequantised().numpy(), weights, rtol=4e-7, atol=4e-7 * np.abs(levels).max())
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grad = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))
    y = made(x)
    flat = x.detach().double().numpy().reshape(6, inputs)
    wanted = flat @ weights.T + (0 if made.bias is None else made.bias.double().numpy())
    assert y.shape == (2, 3, 9)
    np.testing.assert_allclose(y.detach().numpy().reshape(6, 9), wanted, rtol=0, atol=1e-6 * inputs)
    y.backward(grad)
    by_x, by_scale = oracle.gradients(flat, grad.double().numpy().reshape(6, 9), weights, levels, owner)
    assert x.grad is not None and made.scales.grad is not None
    np.testing.assert_allclose(x.grad.numpy().reshape(6, inputs), by_x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made.scales.grad.numpy(), by_scale, rtol=0, atol=1e-6 * inputs)


def test_tiles_and_gradients_do_not_change_a_bit_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(100, 32, zeros=True, constants=True, order=True)
    whole = made.dequantised()
    monkeypatch.setattr(linear, "TILE", 300)
    assert [(r.start, r.stop) for r in made.tiles()] == [(0, 3), (3, 6), (6, 9)]
    assert torch.equal(made.dequantised(), whole)
    # One-hot rows read the matrix through the product: 0 * w is 0, so nothing is rounded.
    assert torch.equal(made(torch.eye(100)).T, whole)


def test_gradients_come_only_where_they_are_asked_for() -> None:
    made, x = layer(64, 32), torch.randn(3, 64)
    assert not made.scales.requires_grad and not made(x).requires_grad
    made(x.requires_grad_()).sum().backward()
    assert x.grad is not None and made.scales.grad is None
    made.scales.requires_grad_()
    y = made(x.detach())
    with torch.no_grad():
        made.scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class _Largest(TorchDispatchMode):
    """Remembers the largest floating tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_more_than_one_tile_is_ever_in_floating_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "TILE", 64 * 8)
    made = layer(64, 32, 400, zeros=True, constants=True)
    made.scales.requires_grad_()
    x = torch.randn(2, 64).requires_grad_()
    with _Largest() as seen:
        made(x).sum().backward()
    assert 0 < seen.elements <= max(64 * 8, 2 * 400)  # a tile, or what comes out; the matrix has 25,600


def test_another_dtype_moves_neither_scales_nor_table_and_computes_in_the_inputs() -> None:
    made = layer(128, 32, zeros=True, bias=True)
    scales, x = made.scales.detach().clone(), torch.randn(4, 128)
    wanted = made(x)
    made.to(torch.bfloat16)
    assert made.scales.dtype == torch.float32 and torch.equal(made.scales, scales)
    y = made(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - wanted).norm() < 0.02 * wanted.norm()
    made.scales.requires_grad_()
    made(x.bfloat16()).sum().backward()
    assert made.scales.grad is not None and made.scales.grad.dtype == torch.float32


def test_a_scale_of_zero_is_fixed_and_the_rest_is_not() -> None:
    made = layer(64, 32)
    assert made.fixed is None and bool(made.trainable_mask().all())
    scales = made.scales.detach().clone()
    scales[2, 1] = 0
    again = linear.QuantLinear(made.codes, scales, made.table, in_features=64, group=32, scheme="test")
    assert again.fixed is not None and again.fixed.nonzero().tolist() == [[2, 1]]
    assert torch.equal(again.trainable_mask(), ~again.fixed)
    assert "fixed" in again.state_dict() and "pairs" not in again.state_dict()


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("scales", torch.ones(4, 3), r"scales are \(4, 3\) .*not \(4, 2\)"),
        ("scales", torch.ones(4, 2, dtype=torch.float16), "scales are .* torch.float16, not"),
        ("codes", torch.ones(4, 64, dtype=torch.uint8), "codes are"),
        ("codes", torch.ones(4, 32, dtype=torch.int8), "codes are"),
        ("table", torch.ones(15), "table are"),
        ("zeros", torch.ones(2, 4), "zeros are"),
        ("fixed", torch.ones(4, 2), "fixed are"),
        ("order", torch.zeros(64, dtype=torch.int32), "no permutation"),
        ("bias", torch.ones(5), r"bias is \(5,\)"),
        ("group", 33, "group of 33 is odd"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(part: str, value: Any, says: str) -> None:
    parts: dict[str, Any] = {"codes": torch.ones(4, 32, dtype=torch.uint8), "scales": torch.ones(4, 2)}
    parts |= {"table": torch.ones(16), "in_features": 64, "group": 32, "scheme": "test"}
    linear.QuantLinear(**parts)
    with pytest.raises(ValueError, match=says):
        linear.QuantLinear(**parts | {part: value})
