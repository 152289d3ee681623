"""The split by whole tensors: at each refresh some parameters of a group have state, and the others none.

A "block" is one parameter, as in the published code, and the density counts parameters, whatever their size. All state
of a parameter is dropped at its refresh, and begins at zero where it is chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainers.optim import keyed
from trainers.optim.clock import BLOCKS, Turn
from trainers.optim.coordinates import Pass, Scratch, sweep
from trainers.optim.rules import rule_of
from trainers.optim.splits import rounding
from trainers.optim.tensors import compute_dtype
from trainers.optim.whole import sweep_all


def active(order: str, total: int, density: float, number: int, key: int) -> set[int]:
    """Which members of a group have state.

    Args:
        order: ``random``; ``ascending`` and ``descending`` walk through the group, some further at each refresh;
            ``mirror`` walks from both ends at once (with an odd number of parameters it passes over the middle one).
        total: Parameters of the group.
        density: Share of them.
        number: Of the refresh, from 0.
        key: For ``random``, the same for all members and different for each refresh.

    Returns:
        Places in the group.

    Raises:
        ValueError: ``mirror`` with an odd number of active parameters.
    """
    n = min(total, round(total * density))
    if order == "random":
        return set(keyed.permutation(total, key)[:n].tolist())
    if order == "ascending":
        return {(number * n + i) % total for i in range(n)}
    if order == "descending":
        return {(total - 1 - number * n - i) % total for i in range(n)}
    if n % 2:
        raise ValueError(
            f"order='mirror' takes as many parameters from the front as from the back, and density {density} of "
            f"{total} parameters is {n}; change density so that it is even"
        )
    front = {(number * (n // 2) + i) % max(1, total // 2) for i in range(n // 2)}
    return front | {total - 1 - place for place in front}


class Blocks:
    """Steps parameters of a group that is split by ``block``. State of an active one: its moments."""

    def __init__(self, scratch: Scratch) -> None:
        """Shares buffers.

        Args:
            scratch: Buffers of all parameters.
        """
        self.scratch = scratch

    def refresh(self, p: Tensor, turn: Turn, group: dict[str, Any], first: int) -> dict[str, Tensor]:
        """Gives new state: zeros for an active parameter, none for another.

        Args:
            p: Weights.
            turn: This step.
            group: Settings.
            first: The place of its group's first parameter.

        Returns:
            The new state.
        """
        number = turn.refreshes - 1
        key = keyed.key(turn.seed, BLOCKS, first, number)
        if turn.place - first not in active(group["order"], len(group["params"]), turn.density, number, key):
            return {}
        dtype = compute_dtype(p.dtype)
        return {name: torch.zeros(p.shape, dtype=dtype, device=p.device) for name in rule_of(group).moments()}

    def advance(self, p: Tensor, g: Tensor, state: dict[str, Tensor], turn: Turn, group: dict[str, Any]) -> None:
        """Takes one step of a parameter, in place.

        Args:
            p: Weights, contiguous.
            g: Gradient, contiguous.
            state: From ``refresh``.
            turn: This step.
            group: Settings.
        """
        rule = rule_of(group)
        moments = [state[name] for name in rule.moments() if name in state]
        rate, decay = float(group["lr"]) * group["lr_scale"], float(group["lr"]) * group["weight_decay"]
        source = rounding(p, turn, group)
        if moments:
            sweep_all(p, g, moments, rule, turn.age, rate, decay, source, self.scratch)
        else:
            free_rate = rate * group["free_lr_scale"]
            step = Pass(rule, rate, group["free"], free_rate, decay, turn.age, source, group["compat"] == "official")
            sweep(p, g, None, [], step, self.scratch)
