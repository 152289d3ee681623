"""One pass over a parameter all of which has state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainers.optim.coordinates import TILE, Scratch
from trainers.optim.rules import Adam, Rule, fusable
from trainers.optim.tensors import compute_dtype, round_to


def sweep_all(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    rule: Rule,
    age: int,
    rate: float,
    decay: float,
    generator: torch.Generator | None,
    scratch: Scratch,
) -> None:
    """Updates a parameter and its moments in place, tile by tile.

    Args:
        p: Weights of any shape and floating dtype, contiguous.
        g: Gradient of the same shape, contiguous.
        moments: Of the same shape, in the rule's order; float32, or float64 for float64 weights.
        rule: How.
        age: Steps since the moments began, this one included.
        rate: Learning rate.
        decay: Taken off the weights first.
        generator: Draws the bits of stochastic rounding; None rounds to nearest.
        scratch: Buffers.
    """
    dtype = compute_dtype(p.dtype)
    one_call = type(rule) is Adam and fusable(p, g, *moments)
    size = TILE if p.device.type == "cpu" and not one_call else max(1, p.numel())
    weights, gradient, state = p.view(-1), g.view(-1), [moment.view(-1) for moment in moments]
    for start in range(0, p.numel(), size):
        span = slice(start, start + size)
        w, d = weights[span], gradient[span]
        if w.dtype != dtype:
            w = scratch.get("weights", w.numel(), w, dtype).copy_(w)
        if d.dtype != dtype:
            d = scratch.get("gradient", d.numel(), d, dtype).copy_(d)
        rule.apply(w, d, [moment[span] for moment in state], age, rate, decay)
        if w.dtype != weights.dtype:
            round_to(weights[span], w, generator)
