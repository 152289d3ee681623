"""Layers with every part that a layer can have, from fixed seeds."""

from __future__ import annotations

from typing import Any

import torch

from core.models.quant.linear import QuantLinear
from core.models.quant.packing import pack


def layer(inputs: int, group: int, outputs: int = 9, *, seed: int = 0, **which: bool) -> QuantLinear:
    """A random layer; ``which`` names the optional parts to give it."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    parts: dict[str, Any] = {}
    if which.get("zeros"):
        parts["zeros"] = torch.randn(outputs, groups, generator=g) * 3
    if which.get("constants"):
        parts["constants"] = torch.randn(outputs, groups, generator=g)
    if which.get("order"):
        parts["order"] = torch.randperm(inputs, generator=g).int()
    if which.get("bias"):
        parts["bias"] = torch.randn(outputs, generator=g)
    codes = torch.randint(0, 16, (outputs, inputs), generator=g, dtype=torch.uint8)
    scales = torch.rand(outputs, groups, generator=g) + 0.1
    table = torch.randn(16, generator=g)
    return QuantLinear(pack(codes), scales, table, in_features=inputs, group=group, scheme="test", **parts)


def arrays(made: QuantLinear) -> dict[str, Any]:
    """The layer's parts as NumPy arrays, None where it has none."""
    names = ("codes", "scales", "table", "zeros", "constants", "order", "bias")
    found = {name: getattr(made, name) for name in names}
    return {name: None if tensor is None else tensor.detach().numpy() for name, tensor in found.items()}
