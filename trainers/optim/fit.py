"""Whether the state of a parameter fits the parameter and its group: kernels that write in place do not ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from trainers.optim.tensors import compute_dtype, local

Shape = Sequence[int | range]
"""Sizes; a range where any of its numbers is one."""


class Fit(NamedTuple):
    """What the state of a parameter that has been stepped looks like."""

    shapes: Mapping[str, Shape]
    """Of this process's part of each tensor, where it is there."""
    needed: Sequence[str] = ()
    """What has to be there."""
    absent: Sequence[str] = ()
    """What must not be there: the settings of the group have no use for it."""


def check_fit(parameter: Tensor, state: Mapping[str, Any], fit: Fit) -> None:
    """Compares state with what its parameter and group ask for.

    Args:
        parameter: For the message.
        state: Of the parameter.
        fit: What it should be.

    Raises:
        ValueError: A tensor is missing, of another shape, too much, or of another floating dtype than updates are
            computed in.
    """
    wrong = next((f"has no {name}" for name in fit.needed if name not in state), None)
    wrong = wrong or next((f"has {name}" for name in fit.absent if name in state), None)
    dtype = compute_dtype(parameter.dtype)
    for name, wanted in fit.shapes.items():
        if wrong is not None or name not in state:
            continue
        value = local(state[name])
        if not _matches(tuple(value.shape), wanted):
            wrong = f"has {name} of shape {tuple(value.shape)}"
        elif value.is_floating_point() and value.dtype != dtype:
            wrong = f"has {name} in {value.dtype} instead of {dtype}"
    if wrong is not None:
        raise ValueError(
            f"the state of a parameter of shape {tuple(parameter.shape)} {wrong}, which does not fit the parameter and "
            "the settings of its group: load a state of the same model and settings, or let this parameter begin anew "
            "by optimizer.state.pop(parameter, None) after changing its group"
        )


def up_to(size: int) -> range:
    """Any size from 0 to this one."""
    return range(size + 1)


def compact_shape(side: str, m: int, n: int) -> Shape:
    """Of the coordinates of an (m, n) matrix in a subspace of any dimension on its left, its right or both sides."""
    return m if side == "right" else up_to(m), n if side == "left" else up_to(n)


def _matches(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        size in want if isinstance(want, range) else size == want for size, want in zip(shape, wanted, strict=True)
    )
