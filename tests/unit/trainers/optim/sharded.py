"""Run by test_sharding.py in each of two processes: DDP and FSDP2 against one process that sees the whole batch."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainers.optim import Frugal, GaLore

STEPS = 7
LOCAL: list[dict[str, Any]] = [
    {"split": "columns"},
    {"split": "columns", "select": "top", "state": "carry"},
    {"split": "columns", "state": "project", "density_end": 0.1, "decay_steps": 6},
    {"split": "column_blocks", "block_columns": 4},
    {"split": "block", "density": 0.5},
    {"split": "random", "side": "right", "state": "project"},
    {"split": "columns", "full": "lion"},
    {"density": 0.0},
]
REPLICATED: list[dict[str, Any]] = [{"split": "rows"}, {"split": "randk"}, {"split": "svd"}]


def build() -> nn.Module:
    """Layers whose rows do not divide by two, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 20), nn.Tanh(), nn.Linear(20, 5)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
    """Steps on the mean of what each process has."""
    optimizer.zero_grad()
    model(rows).square().mean().backward()
    optimizer.step()


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor, on every process."""
    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def close(one: nn.Module, other: nn.Module, what: object) -> None:
    """Raises if two models differ by more than rounding."""
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        difference = float((whole(a) - whole(b)).abs().max())
        assert difference <= 1e-9, (what, difference)


def main() -> None:
    """Everything, in one start of Python."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    data = torch.randn(STEPS, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for settings in [*LOCAL, *REPLICATED]:
        make = {"update_gap": 3, "lr": 0.01, "weight_decay": 0.1, **settings}
        alone, copied = build(), build()
        ddp = DistributedDataParallel(copied)
        one, two = Frugal(alone.parameters(), **make), Frugal(copied.parameters(), **make)
        for step in range(STEPS):
            train(alone, one, data[step])
            train(ddp, two, data[step, rank * 4 : rank * 4 + 4])
        close(alone, copied, ("ddp", settings))
        if settings in REPLICATED:
            continue
        sharded = build()
        fully_shard(sharded, mesh=mesh)
        three = Frugal(sharded.parameters(), **make)
        for step in range(STEPS):
            train(sharded, three, data[step, rank * 4 : rank * 4 + 4])
            if step == 3:  # In the middle of an interval: what torch's sharded checkpoints hold is all there is.
                saved = get_optimizer_state_dict(sharded, three)
                fresh = Frugal(sharded.parameters(), **make)
                set_optimizer_state_dict(sharded, fresh, saved)
                three = fresh
        close(alone, sharded, ("fsdp2", settings))
        for p in sharded.parameters():
            state = three.state[p]
            moments = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
            assert all(isinstance(moment, DTensor) for moment in moments)
            assert all(moment.placements == p.placements for moment in moments)
    refused()
    dist.barrier()
    dist.destroy_process_group()


def refused() -> None:
    """What would need the rows of the other process says so."""
    wrong: list[tuple[Any, dict[str, Any]]] = [
        *((Frugal, settings) for settings in REPLICATED),
        (Frugal, {"split": "random"}),
        (Frugal, {"split": "random", "side": "full"}),
        (Frugal, {"split": "columns", "moments": "int8"}),
        (GaLore, {"rank": 2}),
    ]
    for make, settings in wrong:
        model = build()
        fully_shard(model)
        optimizer = make(model.parameters(), **settings)
        try:
            train(model, optimizer, torch.ones(2, 12, dtype=torch.float64))
        except ValueError as error:
            assert "shard" in str(error), error
        else:
            raise AssertionError(settings)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
