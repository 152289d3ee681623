"""Muon for matrices and AdamW for the rest, both torch's own, as one optimizer with one set of groups and one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainers.optim.base import loss_of

_KINDS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "projected": torch.optim.Muon,
    "full": torch.optim.AdamW,
}


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for groups of role ``projected``, ``torch.optim.AdamW`` for groups of role ``full``.

    Both work on this optimizer's groups and state, so schedulers, ``state_dict`` and checkpoints see one optimizer.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float = 0.02) -> None:
        """Makes both.

        Args:
            params: Groups with a ``role`` each; a group may bring any setting of its optimizer.
            lr: Learning rate of groups that bring none.

        Raises:
            ValueError: A group has no role, or Muon is given something other than matrices.
        """
        self._parts: list[torch.optim.Optimizer] = []
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer of its role; see ``torch.optim.Optimizer.add_param_group``.

        Args:
            param_group: With a ``role``.

        Raises:
            ValueError: It has no role, or Muon is given something other than matrices.
        """
        role, given = param_group.get("role"), param_group["params"]
        if role not in _KINDS:
            raise ValueError(f"every group needs the role projected or full, not {role!r}")
        members = [given] if isinstance(given, torch.Tensor) else list(given)
        group = {"lr": self.defaults["lr"]} | param_group | {"params": members}
        # Alone first, so that a group which its optimizer refuses leaves nothing behind.
        whole = _KINDS[role]([dict(group)]).param_groups[0]
        super().add_param_group(whole | group)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step of both.

        Args:
            closure: Computes the loss, with gradients on, before the step.

        Returns:
            What the closure returned, or None.
        """
        loss = loss_of(closure)
        for part in self._parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Lets both work on this optimizer's own groups and state."""
        self._parts = []
        for role, kind in _KINDS.items():
            groups = [group for group in self.param_groups if group["role"] == role]
            if groups:
                part = kind(groups)
                part.param_groups, part.state = groups, self.state
                self._parts.append(part)
