"""The common training: its schedule reaches every rate of every group, batches come in order, bytes are measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.optimizers.training import train
from trainers.schedule import factor


def test_every_rate_follows_the_schedule_from_its_own_peak() -> None:
    model = nn.Linear(4, 4)
    seen: list[tuple[float, float, float]] = []

    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrix = torch.optim.SGD([{"params": [model.weight], "adam_lr": 3.0}], lr=2.0)
        return [matrix, torch.optim.AdamW([model.bias], lr=0.5)]

    made: list[torch.optim.Optimizer] = []

    def loss(batch: Tensor) -> Tensor:
        groups = [optimizer.param_groups[0] for optimizer in made]
        seen.append((groups[0]["lr"], groups[0]["adam_lr"], groups[1]["lr"]))
        return 0 * model(batch).sum()

    def keep(model: nn.Module) -> list[torch.optim.Optimizer]:
        made.extend(build(model))
        return made

    train(model, keep, loss, [torch.ones(1, 4)] * 11, steps=10, warmup=2)
    shares = [factor(step, total=10, warmup=2, schedule="cosine") for step in range(10)]
    assert seen == [pytest.approx((2 * share, 3 * share, 0.5 * share)) for share in shares]


def test_each_batch_is_used_once_in_order_and_bytes_are_of_the_state_alone() -> None:
    model = nn.Linear(64, 64, bias=False)
    used: list[int] = []

    def loss(batch: Tensor) -> Tensor:
        used.append(int(batch[0, 0]))
        return model(batch).square().mean()

    batches = (torch.full((512, 64), float(index)) for index in range(7))
    trained = train(model, lambda m: [torch.optim.AdamW(m.parameters(), fused=True)], loss, batches, steps=6, warmup=1)
    assert used == list(range(6)) and not trained.diverged
    assert trained.held_bytes == trained.state_bytes == 2 * 4 * 64 * 64 + 4


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    model = nn.Linear(2, 2)
    calls: list[int] = []

    def loss(batch: Tensor) -> Tensor:
        calls.append(1)
        return model(batch).sum() * (math.nan if len(calls) == 3 else 1.0)

    trained = train(
        model, lambda m: [torch.optim.SGD(m.parameters(), lr=0.1)], loss, [torch.ones(1, 2)] * 9, steps=8, warmup=0
    )
    assert trained.diverged and len(calls) == 3
