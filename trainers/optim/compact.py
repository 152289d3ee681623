"""The moments of a compact part: how they are stored, and how they move when the part changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.optim import moments8
from trainers.optim.coordinates import Chosen, Columns, Rows, Scattered

SCALE = "_scale"


def blank(
    names: Sequence[str], shape: tuple[int, ...], group: dict[str, Any], like: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """State of zeros.

    Args:
        names: Of the moments.
        shape: Of each.
        group: Settings; ``moments`` says how they are stored.
        like: Gives the device.
        dtype: Of moments that are not stored in eight bits.

    Returns:
        Tensors by name.
    """
    state: dict[str, Tensor] = {}
    for name in names:
        if group["moments"] == "int8":
            state[name], state[name + SCALE] = moments8.blank(name, shape, like.device)
        else:
            state[name] = torch.zeros(shape, dtype=dtype, device=like.device)
    return state


def read(state: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The moments as numbers: the state itself, or decoded copies of it."""
    return [
        moments8.decode(name, state[name], state[name + SCALE]) if name + SCALE in state else state[name]
        for name in names
    ]


def write(
    state: dict[str, Tensor],
    names: Sequence[str],
    values: Sequence[Tensor],
    generator: Callable[[], torch.Generator | None],
) -> None:
    """Puts back what ``read`` gave, after it was changed in place.

    Args:
        state: Of the matrix.
        names: Of the moments.
        values: What ``read`` gave.
        generator: Makes the source of the rounding; called only if something is rounded.
    """
    source = None
    for name, value in zip(names, values, strict=True):
        if name + SCALE in state:
            source = source or generator()
            moments8.encode(name, value, state[name], state[name + SCALE], source)
        elif value is not state[name]:
            state[name].copy_(value)


def survivors(before: Columns | Rows, after: Columns | Rows) -> tuple[Tensor, Tensor]:
    """Which slots of a new choice were in the old one.

    Args:
        before: Old choice of columns or rows.
        after: New choice of the same matrix.

    Returns:
        (kept,) new slots that survive, and (kept,) the old slots they come from, int64.
    """
    axis = 1 if isinstance(after, Columns) else 0
    slot = torch.full((after.shape[axis],), -1, dtype=torch.int64, device=after.index.device)
    slot[before.index] = torch.arange(before.index.numel(), device=slot.device)
    source = slot[after.index]
    kept = (source >= 0).nonzero().view(-1)
    return kept, source[kept]


def moved(old: Tensor, before: Chosen, after: Chosen) -> Tensor:
    """Re-projects a moment: P_new(P_old^-1(s)) of FRUGAL's Algorithm 1 (arXiv 2411.07837).

    For coordinates this keeps what belongs to a coordinate that was chosen before, and is zero elsewhere.

    Args:
        old: Of the old choice's shape.
        before: Old choice.
        after: New choice of the same matrix.

    Returns:
        Of the new choice's shape.
    """
    fresh = old.new_zeros(after.state_shape())
    if isinstance(after, Scattered):
        assert isinstance(before, Scattered)
        whole = old.new_zeros(after.shape[0] * after.shape[1])
        for piece in before.pieces(1 << 17):
            before.put(whole[piece.span], piece, old[piece.slots])
        for piece in after.pieces(1 << 17):
            after.take(whole[piece.span], piece, fresh[piece.slots])
        return fresh
    assert not isinstance(before, Scattered)
    kept, source = survivors(before, after)
    if isinstance(after, Columns):
        fresh[:, kept] = old[:, source]
    else:
        fresh[kept] = old[source]
    return fresh


def kept_as_it_is(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The old numbers in a new shape: slots beyond it are dropped, missing ones are zero.

    Args:
        old: A moment.
        shape: Wanted shape, of as many dimensions.

    Returns:
        ``old`` itself if it has that shape.
    """
    if tuple(old.shape) == shape:
        return old
    fresh = old.new_zeros(shape)
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
    fresh[common] = old[common]
    return fresh
