"""bitsandbytes' NF4 layers as our own: the same matrix, with float32 scales that can be tuned.

Scales that were quantised a second time are expanded once (8 bits a block become 32): a change of a few per mille would
be lost between two of their 256 steps. Take layers over before their first forward pass in eval mode: on CPUs with
AVX512-BF16 that pass replaces codes and scales for good by a bfloat16 layout, and earlier references go stale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.models.quant.linear import QuantLinear


def expand(absmax: Tensor, table: Tensor, second: Tensor, block: int, offset: float | Tensor) -> Tensor:
    """The float32 scales behind scales of 8 bits.

    Args:
        absmax: (blocks,) uint8, one for each block of weights.
        table: (256,) float32, what a byte stands for.
        second: (ceil(blocks / block),) float32, what the entries of the table are scaled by.
        block: how many scales share one of ``second``.
        offset: added to all.

    Returns:
        (blocks,) float32.

    Raises:
        ValueError: if the parts do not fit together.
    """
    if absmax.dtype != torch.uint8 or table.shape != (256,) or second.numel() != -(-absmax.numel() // block):
        raise ValueError("the scales of bitsandbytes' double quantisation do not fit together")
    values = table.float()[absmax.flatten().long()]
    return values * second.float().flatten().repeat_interleave(block)[: values.numel()] + offset


def layer(
    packed: Tensor, absmax: Tensor, table: Tensor, shape: tuple[int, int], block: int, bias: Tensor | None = None
) -> QuantLinear:
    """A layer from bitsandbytes' parts.

    Args:
        packed: uint8, the codes of the flattened matrix, the first of a pair in the high half of its byte.
        absmax: (blocks,) float32.
        table: (16,) float32, NF4's levels.
        shape: (O, I) of the matrix.
        block: weights that share a scale.
        bias: (O,).

    Returns:
        The layer.

    Raises:
        ValueError: if blocks straddle the matrix's rows, or the parts do not fit together.
    """
    outputs, inputs = shape
    if inputs % block or inputs % 2:
        raise ValueError(f"blocks of {block} straddle the rows of {inputs}; quantise the base with nf4 here instead")
    if (
        packed.dtype != torch.uint8
        or 2 * packed.numel() != outputs * inputs
        or absmax.numel() * block != 2 * len(packed.flatten())
    ):
        raise ValueError("bitsandbytes' codes and scales are not those of the matrix's shape")
    flat = packed.flatten()
    return QuantLinear(
        ((flat >> 4) | (flat << 4)).view(outputs, inputs // 2),
        absmax.float().view(outputs, inputs // block),
        table.float().clone(),
        in_features=inputs,
        group=block,
        scheme="nf4",
        bias=bias,
    )


def convert(model: nn.Module) -> dict[str, QuantLinear]:
    """Replaces the 4-bit layers that bitsandbytes made, in place.

    Args:
        model: any module; the layers have not computed anything in eval mode yet, or are kept from repacking.

    Returns:
        The new layers by their full names.

    Raises:
        ValueError: if a layer is not NF4, was repacked already, or has blocks that straddle rows.
    """
    from bitsandbytes.nn import Linear4bit

    made = {}
    for name, old in list(model.named_modules()):
        if isinstance(old, Linear4bit):
            try:
                made[name] = _take(old).train(old.training)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            model.set_submodule(name, made[name])
    return made


def _take(old: Any) -> QuantLinear:
    state = old.weight.quant_state
    if state is None or state.quant_type != "nf4":
        raise ValueError("the layer is not quantised to NF4; load the base with quant bnb-nf4")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has repacked the layer for inference already; convert a freshly loaded model")
    absmax = state.absmax
    if state.nested:
        absmax = expand(absmax, state.state2.code, state.state2.absmax, state.state2.blocksize, state.offset)
    bias = None if old.bias is None else old.bias.detach()
    return layer(old.weight.data.view(torch.uint8), absmax, state.code, tuple(state.shape), state.blocksize, bias)
