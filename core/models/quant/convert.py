"""A model's linear layers replaced by quantised ones, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.models.quant.linear import QuantLinear
from core.models.quant.quantise import check, quantise
from core.models.sites import blocks


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a model's blocks, by their full names; never embeddings, head or norms.

    Args:
        model: a causal language model without adapters.

    Returns:
        The layers in the order of the modules.

    Raises:
        ValueError: if the model carries adapters, or its blocks have no linear layers (GPT-2's are of another kind).
    """
    if hasattr(model, "peft_config"):
        raise ValueError("the model carries an adapter: quantise the base, then put the adapter on")
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    found = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) in inside
    }
    if not found:
        raise ValueError("the model's blocks have no linear layers left that could be quantised")
    return found


def quantised(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantised layers of a model, by their full names, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quantise_model(model: nn.Module, scheme: str, group: int = 64) -> dict[str, QuantLinear]:
    """Quantises the linear layers inside the blocks in place, one after another, each on its own.

    Round-to-nearest without calibration data; embeddings, tied or not, head and norms stay as they are. Parameters that
    stay are not frozen here. The floats of a layer are given back before the next is quantised, but the whole model is
    in memory at the start.

    Args:
        model: a causal language model without adapters.
        scheme: ``int4`` or ``nf4``.
        group: as in :func:`core.models.quant.quantise.quantise`.

    Returns:
        The new layers by their full names.

    Raises:
        ValueError: if the scheme, the group or the model is refused; the model is unchanged then, unless a later matrix
            of it is not finite.
    """
    check(scheme, group)
    names = list(linears(model))
    made = {}
    for name in names:
        linear: Any = model.get_submodule(name)
        bias = None if linear.bias is None else linear.bias.detach()
        try:
            made[name] = quantise(linear.weight, scheme, group, bias).train(linear.training)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, made[name])
    return made


def dequantise_model(model: nn.Module) -> None:
    """Replaces the quantised layers by ``nn.Linear`` of the matrices that they stand for, in the model's dtype.

    Args:
        model: any module.
    """
    layers = quantised(model)
    scales = {id(layer.scales) for layer in layers.values()}
    dtype = next((p.dtype for p in model.parameters() if id(p) not in scales), torch.float32)
    for name, layer in layers.items():
        matrix = layer.dequantised().to(dtype)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(matrix)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.to(dtype))
        model.set_submodule(name, plain.train(layer.training))
