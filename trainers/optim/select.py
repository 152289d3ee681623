"""Which basis vectors to keep state for, and in which slot: top r by score, deterministic, without a synchronisation.

State lives in slots 0..r-1; ``index[slot]`` says which basis vector a slot follows. A new choice leaves every vector
that stays in its slot and gives the slots of those that go to those that come. Since the basis is orthonormal, that
*is* the rotation of the state from the old subspace to the new one: Q_old^T Q_new is a partial permutation, so the
state of a vector that stays is kept bit for bit, and that of one that comes is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose(scores: Tensor, count: int, current: Tensor | None = None, hysteresis: float = 0.0) -> Tensor:
    """The vectors with the highest scores; among equals the lowest number.

    Args:
        scores: (n,), not negative.
        count: How many, at most n.
        current: (r,) vectors chosen before, which ``hysteresis`` favours.
        hysteresis: A vector takes the place of a chosen one only if its score is more than (1 + hysteresis) times as
            high.

    Returns:
        (count,) int64, highest score first.
    """
    if current is not None and hysteresis:
        boosted = scores.clone()
        boosted[current] = scores[current] * (1 + hysteresis)
        scores = boosted
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def arrange(current: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Gives every chosen vector a slot: those that stay keep theirs, newcomers fill the others, both ascending.

    Args:
        current: (r,) vector of each slot so far.
        chosen: (r,) vectors of the new choice, in any order.
        n: Size of the basis.

    Returns:
        The vector of each slot from now on, (r,) in the dtype of ``current``, and which slots have a new one, (r,)
        bool.
    """
    wide = current.to(torch.int64)
    wanted = torch.zeros(n, dtype=torch.bool, device=current.device).index_fill_(0, chosen, True)
    fresh = ~wanted[wide]
    coming = wanted.index_fill(0, wide, False)
    # As many come as go; sorted by "does not come", the newcomers stand first, in ascending order.
    newcomers = torch.sort(~coming, stable=True).indices[: wide.numel()]
    place = (fresh.cumsum(0) - 1).clamp_(min=0)
    return torch.where(fresh, newcomers[place], wide).to(current.dtype), fresh


def forget(state: Tensor, fresh: Tensor) -> None:
    """Zeroes the columns of the slots that have a new vector, whatever they held.

    Args:
        state: (rows, r) or (r,), in place.
        fresh: (r,) bool.
    """
    state.masked_fill_(fresh, 0)
