"""When a parameter's subspace is drawn anew: by the parameter's own steps, not by those of its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.optim import keyed

SUBSET, BASIS, ROUNDING, CODES, BLOCKS = range(5)
"""What a key is for."""


@dataclass(frozen=True)
class Turn:
    """One step of one matrix, as its split needs to know it."""

    seed: int
    place: int
    """The parameter's number among all."""
    part: int
    """The matrix's number in a stack."""
    step: int
    """This parameter's steps, this one included."""
    refreshes: int
    """How often its subspace was drawn, this step included; the first is 1."""
    since: int
    """The step of the last of these."""
    density: float
    """Share of the matrix that has state, as of this step."""

    @property
    def due(self) -> bool:
        """Whether the subspace is drawn anew in this step."""
        return self.step == self.since

    @property
    def age(self) -> int:
        """Steps since the last refresh, this one included."""
        return self.step - self.since + 1

    def key(self, purpose: int, number: int) -> int:
        """The key of a draw.

        Args:
            purpose: One of the constants above.
            number: Which draw: the number of a refresh or of a step.

        Returns:
            A key for ``keyed``.
        """
        return keyed.key(self.seed, purpose, self.place, self.part, number)

    def generator(self, purpose: int, device: torch.device) -> torch.Generator:
        """A generator for this step alone."""
        return keyed.generator(self.key(purpose, self.step), device)


def advance(state: dict[str, Any], group: dict[str, Any], place: int) -> Turn:
    """Moves a parameter's clock on by one step.

    Subspaces are drawn at the first step and every ``update_gap`` steps from then on; with ``stagger``, the parameter
    in place i draws at the first step and then i mod ``update_gap`` steps out of line, so that no step draws them all.
    The density falls on a straight line from ``density`` to ``density_end`` over the first ``decay_steps`` steps, and
    takes effect at each refresh.

    Args:
        state: Of the parameter; gets ``step``, ``refreshes`` and ``since``, int64 scalars on the CPU.
        group: Its settings.
        place: Its number among all parameters.

    Returns:
        The step to be taken.
    """
    step, gap = tick(state), int(group["update_gap"])
    clock: dict[str, Tensor] = state
    for name in ("refreshes", "since"):
        if name not in clock:
            clock[name] = torch.zeros((), dtype=torch.int64, device="cpu")
    offset = place % gap if group["stagger"] else 0
    if step == 1 or (step - 1) % gap == offset:
        clock["refreshes"] += 1
        clock["since"].copy_(clock["step"])
    density = float(group["density"])
    if group["density_end"] is not None:
        density += (float(group["density_end"]) - density) * min(1.0, (step - 1) / group["decay_steps"])
    return Turn(int(group["seed"]), place, 0, step, int(clock["refreshes"]), int(clock["since"]), density)


def tick(state: dict[str, Any]) -> int:
    """Counts one step in ``state["step"]``, and gives the count."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
    state["step"] += 1
    return int(state["step"])
