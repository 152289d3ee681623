"""The split of FRUGAL (arXiv 2411.07837) by coordinates: some columns, rows or elements have state, the others none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainers.optim import choice, compact
from trainers.optim.clock import CODES, ROUNDING, SUBSET, Turn
from trainers.optim.coordinates import Chosen, Pass, Scattered, Scratch, squares, sweep
from trainers.optim.rules import Age, rule_of
from trainers.optim.tensors import compute_dtype

Sum = Callable[[Tensor], Tensor]
"""Adds up over the shards of a parameter."""


class Coordinates:
    """Steps matrices that are split by ``columns``, ``column_blocks``, ``rows`` or ``randk``.

    State of a matrix: the moments of the chosen part; with ``select="top"`` also ``indices`` (int32, of the columns,
    blocks or rows) and ``score`` (one float for each column or row); with ``state="carry"`` also ``age`` (int32, one
    for each chosen column or row). A random choice is not stored.
    """

    def __init__(self, scratch: Scratch) -> None:
        """Keeps the choices in use, so that they are worked out once a refresh.

        Args:
            scratch: Buffers shared by all parameters.
        """
        self.scratch = scratch
        self.cache: dict[tuple[int, int], tuple[tuple[int, int, int], Chosen]] = {}

    def refresh(
        self, p: Tensor, g: Tensor, old: dict[str, Tensor], turn: Turn, group: dict[str, Any], total: Sum
    ) -> dict[str, Tensor]:
        """Chooses anew, and gives state that fits.

        Args:
            p: Weights (m, n).
            g: Gradient.
            old: State so far; empty at the first refresh.
            turn: This step.
            group: Settings.
            total: Adds up over shards.

        Returns:
            The new state.
        """
        rule, split, shape = rule_of(group), group["split"], (p.shape[0], p.shape[1])
        names = rule.moments()
        k = choice.count(split, shape, turn.density, group)
        before = self._current(p, old, turn, group, turn.refreshes - 1) if old else None
        self.cache.pop((turn.place, turn.part), None)  # State that was cleared begins again at refresh 1.
        fresh: dict[str, Tensor] = {}
        if group["select"] == "top":
            fresh["score"] = self._score(g, old, group, total)
            fresh["indices"] = choice.largest(split, fresh["score"], k, group).to(torch.int32)
        after = self._now(p, fresh, k, turn, group, turn.refreshes)
        if after is None:
            return fresh
        fresh |= compact.blank(names, after.state_shape(), group, p, compute_dtype(p.dtype))
        if group["state"] == "carry":
            axis = 0 if split == "rows" else 1
            fresh["age"] = torch.zeros(after.state_shape()[axis], dtype=torch.int32, device=p.device)
        if before is not None and group["state"] != "reset":
            values = [
                compact.kept_as_it_is(value, after.state_shape())
                if group["state"] == "keep"
                else compact.moved(value, before, after)
                for value in compact.read(old, names)
            ]
            compact.write(fresh, names, values, lambda: turn.generator(CODES, p.device))
            if group["state"] == "carry":
                assert not isinstance(after, Scattered)
                assert not isinstance(before, Scattered)
                kept, source = compact.survivors(before, after)
                fresh["age"][kept] = old["age"][source]
        return fresh

    def advance(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], turn: Turn, group: dict[str, Any], total: Sum
    ) -> None:
        """Takes one step of a matrix, in place.

        Args:
            p: Weights (m, n), contiguous.
            g: Gradient, contiguous.
            state: From ``refresh``.
            turn: This step.
            group: Settings.
            total: Adds up over shards.
        """
        rule = rule_of(group)
        if group["select"] == "top" and not turn.due:
            state["score"].copy_(self._score(g, state, group, total))
        now = self._current(p, state, turn, group, turn.refreshes)
        age: Age = turn.age if group["state"] == "reset" else turn.step
        if "age" in state:
            age = state["age"].add_(1)
        moments = compact.read(state, rule.moments()) if now is not None else []
        rate = float(group["lr"]) * group["lr_scale"]
        turn_pass = Pass(
            rule=rule,
            rate=rate,
            free=group["free"],
            free_rate=rate * group["free_lr_scale"],
            decay=float(group["lr"]) * group["weight_decay"],
            age=age,
            generator=rounding(p, turn, group),
            plain=group["compat"] == "official",
        )
        sweep(p, g, now, moments, turn_pass, self.scratch)
        if now is not None:
            compact.write(state, rule.moments(), moments, lambda: turn.generator(CODES, p.device))

    def _score(self, g: Tensor, old: dict[str, Tensor], group: dict[str, Any], total: Sum) -> Tensor:
        new = total(squares(g, 1 if group["split"] == "rows" else 0))
        return old["score"] * choice.MEMORY + new * (1 - choice.MEMORY) if "score" in old else new

    def _current(
        self, p: Tensor, state: dict[str, Tensor], turn: Turn, group: dict[str, Any], refresh: int
    ) -> Chosen | None:
        """The choice that some state belongs to; its size is read off the state, whatever the density is by now."""
        name = rule_of(group).moments()[0]
        if name not in state:
            return None
        split, shape = group["split"], state[name].shape
        k = {"columns": shape[-1], "column_blocks": -(-shape[-1] // group["block_columns"])}.get(split, shape[0])
        return self._now(p, state, k, turn, group, refresh)

    def _now(
        self, p: Tensor, state: dict[str, Tensor], k: int, turn: Turn, group: dict[str, Any], refresh: int
    ) -> Chosen | None:
        if k == 0:
            return None
        place, what = (turn.place, turn.part), (turn.seed, refresh, k)
        if self.cache.get(place, ((),))[0] == what:
            return self.cache[place][1]
        shape = (p.shape[0], p.shape[1])
        picked: Tensor | int = 0  # A plan on tensors without data has no use for the passes that a bound takes.
        if "indices" in state:
            picked = state["indices"]
        elif not (p.is_meta and group["split"] == "randk"):
            picked = choice.drawn(group["split"], shape, k, turn, refresh, group)
        made = choice.chosen(group["split"], shape, picked, k, turn.key(SUBSET, refresh), group, p)
        self.cache[place] = what, made
        return made


def rounding(p: Tensor, turn: Turn, group: dict[str, Any]) -> torch.Generator | None:
    """What rounds a step's weights: at random for bfloat16, under a key of this step; else nothing."""
    if p.dtype != torch.bfloat16 or group["compat"] == "official":
        return None
    return turn.generator(ROUNDING, p.device)
