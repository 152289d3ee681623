"""METHODS: the only list of fitting methods. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from core.nearest import choices
from steering.method import Advance, Fitted, Method

if TYPE_CHECKING:
    from core.models.load import Loaded
    from steering.config import FitConfig
    from steering.pairs import Pair


def _mean_difference(loaded: Loaded, pairs: Sequence[Pair], config: FitConfig, advance: Advance) -> Fitted:
    from steering.mean_difference import fit

    return fit(loaded, pairs, config, advance)


_ALL = (
    Method(
        name="mean_difference",
        paper="2312.06681",
        summary="Mean activation over the positive texts minus that over the negative ones, per layer.",
        fit=_mean_difference,
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
assert len(METHODS) == len(_ALL), "two methods have one name"


def get_method(name: str) -> Method:
    """Find a method.

    Args:
        name: Its name.

    Returns:
        The method.

    Raises:
        ValueError: Unknown; the message has the nearest name and lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown steering method {name[:64]!r}; {choices(name, sorted(METHODS))}")
    return METHODS[name]
