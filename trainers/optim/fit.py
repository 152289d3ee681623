"""Whether the state of a parameter fits the parameter and its group: kernels that write in place do not ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from trainers.optim.tensors import local

Shape = Sequence[int | range]
"""Sizes; a range where any of its numbers is one."""


class Fit(NamedTuple):
    """What the state of a parameter that has been stepped looks like."""

    shapes: Mapping[str, Shape]
    """Of this process's part of each tensor, where it is there."""
    needed: Sequence[str] = ()
    """What has to be there."""


def check_fit(parameter: Tensor, state: Mapping[str, Any], fit: Fit) -> None:
    """Compares state with what its parameter and group ask for.

    Args:
        parameter: For the message.
        state: Of the parameter.
        fit: What it should be.

    Raises:
        ValueError: A tensor is missing or of another shape.
    """
    wrong = next((f"has no {name}" for name in fit.needed if name not in state), None)
    for name, wanted in fit.shapes.items():
        if wrong is None and name in state and not _matches(tuple(local(state[name]).shape), wanted):
            wrong = f"has {name} of shape {tuple(local(state[name]).shape)}"
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
