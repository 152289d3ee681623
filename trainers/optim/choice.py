"""Which columns, rows or elements have state now: drawn under a key, or the ones with the largest gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainers.optim import keyed
from trainers.optim.clock import SUBSET, Turn
from trainers.optim.coordinates import Chosen, Columns, Rows, Scattered

MEMORY = 0.9
"""Share of the running mean of squared column norms that a step leaves; the mean is over some ten steps."""


def count(split: str, shape: tuple[int, int], density: float, group: dict[str, Any]) -> int:
    """How many are chosen.

    Args:
        split: ``columns``, ``column_blocks``, ``rows`` or ``randk``.
        shape: (m, n) of the matrix.
        density: Share of them.
        group: Settings; ``block_columns`` is the width of a block. The published code rounds down where this rounds
            to nearest, and so loses a column of most widths; ``compat="official"`` does as it does.

    Returns:
        A number of columns, blocks, rows or elements.
    """
    total = {
        "columns": shape[1],
        "column_blocks": math.ceil(shape[1] / group["block_columns"]),
        "rows": shape[0],
        "randk": shape[0] * shape[1],
    }[split]
    exact = total * density
    number = int(exact) if group["compat"] == "official" else round(exact)
    return min(int(total), number)


def drawn(split: str, shape: tuple[int, int], k: int, turn: Turn, refresh: int, group: dict[str, Any]) -> Tensor | int:
    """The keyed choice of a refresh: nothing of it is stored, it can be worked out again at any time.

    Args:
        split: Which kind.
        shape: (m, n) of the matrix.
        k: How many; from ``count``.
        turn: Whose draw.
        refresh: Its number.
        group: Settings.

    Returns:
        (k,) int64 ascending numbers of columns, blocks or rows; for ``randk`` the bound of ``keyed.threshold``.
    """
    key = turn.key(SUBSET, refresh)
    if split == "randk":
        return keyed.threshold(shape[0] * shape[1], k, key)
    total = {"columns": shape[1], "rows": shape[0]}.get(split, math.ceil(shape[1] / group["block_columns"]))
    return keyed.subset(total, k, key)


def largest(split: str, score: Tensor, k: int, group: dict[str, Any]) -> Tensor:
    """The ``k`` with the largest running mean of squared norms; among equals the first.

    Args:
        split: ``columns``, ``column_blocks`` or ``rows``.
        score: One number for each column or row.
        k: How many.
        group: Settings.

    Returns:
        (k,) int64, ascending.
    """
    if split == "column_blocks":
        width = group["block_columns"]
        score = torch.nn.functional.pad(score, (0, -score.numel() % width)).view(-1, width).sum(1)
    return score.sort(descending=True, stable=True).indices[:k].sort().values


def chosen(
    split: str, shape: tuple[int, int], picked: Tensor | int, k: int, key: int, group: dict[str, Any], like: Tensor
) -> Chosen:
    """Makes a choice ready for ``sweep``.

    Args:
        split: Which kind.
        shape: (m, n) of the matrix (of the local shard).
        picked: From ``drawn`` or ``largest``.
        k: How many were picked.
        key: Of the draw, for ``randk``.
        group: Settings.
        like: Gives the device.

    Returns:
        The choice.
    """
    if isinstance(picked, int):
        return Scattered(shape, k, key, picked)
    picked = picked.to(like.device, torch.int64)
    if split == "rows":
        return Rows(shape, picked)
    if split == "columns":
        return Columns(shape, picked)
    width = group["block_columns"]
    index = (picked.unsqueeze(1) * width + torch.arange(width, device=like.device)).view(-1)
    if shape[1] % width == 0:
        return Columns(shape, index, width)
    # Only the last block can be cut short; blocks are in ascending order, so it is last here too.
    short = int(k > 0 and _ends_short(picked, shape[1], width)) * (-shape[1] % width)
    return Columns(shape, index[: index.numel() - short])


def _ends_short(picked: Tensor, columns: int, width: int) -> bool:
    return not picked.is_meta and int(picked[-1]) == columns // width
