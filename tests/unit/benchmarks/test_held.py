"""Measured bytes: everything an optimizer keeps, each storage once, and nothing of the model."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.optimizers.held import Held, state_bytes


class Keeper(torch.optim.SGD):
    """Keeps one tensor in its state, a view of the same, and one in a cache beside it."""

    cache: dict[str, torch.Tensor]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["m"] = torch.zeros(100)
                self.state[p]["view"] = self.state[p]["m"][10:]
        self.cache = {"basis": torch.zeros(50)}


def test_state_and_caches_are_counted_once_and_parameters_are_not() -> None:
    model, before = nn.Linear(8, 8, bias=False), torch.zeros(1000)
    held = Held()
    optimizer = Keeper(model.parameters(), lr=0.1)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert state_bytes([optimizer]) == 400
    assert held.bytes(model.parameters()) == 600 and before.numel()


def test_adamw_holds_two_moments_and_a_counter() -> None:
    model = nn.Linear(64, 64, bias=False)
    held = Held()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert held.bytes(model.parameters()) == state_bytes([optimizer]) == 2 * 4 * 64 * 64 + 4
