"""One of two processes that ``test_dct_sharded.py`` starts: ``python -m ... {sharded,replicas,fsdp}``."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.unit.trainers.optim.projected_helpers import follow, gradients, start
from trainers.optim import DctAdamW, Frugal, GaLore, Trion

# Seven rows do not divide by two; (1, 8) leaves the second process with none; experts are split whole.
SHAPES = ((20, 12), (7, 12), (1, 8), (4, 6, 8), (9,), (6, 3, 2, 2))
VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (DctAdamW, {"lr": 1e-2}),
    (DctAdamW, {"lr": 1e-2, "transform": "fft", "norm": 2, "update_gap": 3, "feedback": "full", "ages": True}),
    (DctAdamW, {"lr": 1e-2, "feedback": "8bit", "basis": "identity", "hysteresis": 0.2}),
    (DctAdamW, {"lr": 1e-2, "basis": "learned", "learn_steps": 3, "learn_gap": 5}),
    (Trion, {}),
    (Trion, {"basis": "hadamard", "weight_decay": 0.1}),
]


def sharded() -> None:
    """A DTensor sharded by rows and a plain tensor end with the same weights, up to the order of a sum."""
    mesh = init_device_mesh("cpu", (2,))
    for kind, settings in VARIANTS:
        plain = [start(shape) for shape in SHAPES]
        # Sharded rows are looked at from the right; so is the plain tensor. Experts whole: their own side.
        groups: list[dict[str, Any]] = [{"params": [p], "side": "std" if p.dim() == 3 else "right"} for p in plain]
        one = kind(groups, rank=4, **settings)
        parts = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
        two = kind([{"params": [p]} for p in parts], rank=4, **settings)
        for step in range(14):
            whole = [gradients(shape)[step] for shape in SHAPES]
            follow(one, [dict(zip(plain, whole, strict=True))])
            follow(two, [dict(zip(parts, [distribute_tensor(g, mesh, [Shard(0)]) for g in whole], strict=True))])
        for p, q in zip(plain, parts, strict=True):
            assert isinstance(q, DTensor)
            difference = float((q.full_tensor() - p).detach().abs().max())
            assert difference <= 1e-9, (kind.__name__, settings, tuple(p.shape), difference)
            for name, value in two.state[q].items():
                if isinstance(value, DTensor):
                    other = value.full_tensor()
                    assert other.shape == one.state[p][name].shape, name
                    assert torch.allclose(other.double(), one.state[p][name].double(), atol=1e-9), name


def nothing_held() -> None:
    """A process may hold no row of a bfloat16 weight, whose rows are read tile by tile."""
    mesh = init_device_mesh("cpu", (2,))
    for basis in ("dct", "identity"):
        weight = nn.Parameter(distribute_tensor(torch.ones(1, 8, dtype=torch.bfloat16), mesh, [Shard(0)]))
        optimizer = DctAdamW([weight], lr=1e-2, rank=4, basis=basis, update_gap=3, transform="matmul")
        for _ in range(5):
            weight.grad = distribute_tensor(torch.ones(1, 8, dtype=torch.bfloat16), mesh, [Shard(0)])
            optimizer.step()
        assert isinstance(weight, DTensor)
        assert bool((weight.full_tensor() != 1).any())


def columns_refused() -> None:
    """Weights sharded by columns (tensor parallel) are refused before anything is written."""
    mesh = init_device_mesh("cpu", (2,))
    for kind in (Frugal, GaLore, DctAdamW, Trion):
        for role in ("full", "projected"):
            weight = nn.Parameter(distribute_tensor(torch.ones(6, 8), mesh, [Shard(1)]))
            optimizer = kind([{"params": [weight], "role": role}])
            weight.grad = distribute_tensor(torch.ones(6, 8), mesh, [Shard(1)])
            try:
                optimizer.step()
            except ValueError as error:
                assert "sharded by dimension 0" in str(error), error
            else:
                raise AssertionError((kind, role))
            assert not optimizer.state and bool((weight.to_local() == 1).all())  # type: ignore[attr-defined]


def float32() -> None:
    """Averaged by DDP, gradients differ from one process's by rounding, and hardly a weight by more than that."""
    arms: list[tuple[Any, dict[str, Any]]] = [
        (Frugal, {"update_gap": 3}),
        (Frugal, {"density": 0.0}),
        (Frugal, {"update_gap": 3, "select": "top"}),
        (GaLore, {"rank": 4, "update_gap": 3}),
        (DctAdamW, {"rank": 4}),
        (Trion, {"rank": 4}),
    ]
    for kind, settings in arms:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 24))
        alone = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        pairs = [(wrapped, kind(model.parameters(), **settings)), (alone, kind(alone.parameters(), **settings))]
        draw = torch.Generator().manual_seed(5)
        for step in range(4):
            x = torch.randn(64, 24, generator=draw)
            mine = x[dist.get_rank() * 32 : dist.get_rank() * 32 + 32]
            for (net, optimizer), rows in zip(pairs, (mine, x), strict=True):
                optimizer.zero_grad()
                (net(rows) - rows.roll(1, 1)).square().mean().backward()
                if step:
                    optimizer.step()
            if not step:  # Of equal weights.
                one, two = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net, _ in pairs)
                assert float((one - two).norm() / two.norm()) <= 1e-5, kind
                for _, optimizer in pairs:
                    optimizer.step()
        apart = torch.cat(
            [((p - q).abs() > 1e-4).flatten() for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
        )
        assert float(apart.float().mean()) <= 1e-4, (kind, settings, int(apart.sum()), apart.numel())


def replicas() -> None:
    """DDP averages gradients; each replica then chooses the same vectors and ends with the same bits."""
    for kind, settings in VARIANTS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12)).double()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = kind(model.parameters(), rank=4, seed=3, **settings)
        alone = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12)).double()
        alone.load_state_dict(model.state_dict())
        other = kind(alone.parameters(), rank=4, seed=3, **settings)
        draw = torch.Generator().manual_seed(5)
        for _ in range(14):
            x = torch.randn(64, 12, generator=draw, dtype=torch.float64)
            mine = x[dist.get_rank() * 32 : dist.get_rank() * 32 + 32]
            for net, own, rows in ((wrapped, optimizer, mine), (alone, other, x)):
                own.zero_grad()
                (net(rows) - rows).square().mean().backward()
                own.step()
        mine_now = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(mine_now) for _ in range(2)]
        dist.all_gather(both, mine_now)
        assert torch.equal(both[0], both[1]), kind.__name__
        one = torch.cat([p.detach().flatten() for p in alone.parameters()])
        assert float((one - mine_now).abs().max()) <= 1e-9, (kind.__name__, settings)


def fsdp() -> None:
    """FSDP2 in an interval, saved by torch's sharded state dict and loaded into a fresh optimizer, is one process."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 20), nn.Tanh(), nn.Linear(20, 5)).double()

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    data = torch.randn(8, 64, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kind, settings in VARIANTS:
        alone, shards = build(), build()
        fully_shard(shards, mesh=mesh)
        one = kind(alone.parameters(), rank=4, side="right", **settings)
        two = kind(shards.parameters(), rank=4, **settings)
        for step, rows in enumerate(data):
            for net, optimizer, own in ((alone, one, rows), (shards, two, rows[rank * 32 : rank * 32 + 32])):
                optimizer.zero_grad()
                (net(own) - own[:, :5]).square().mean().backward()
                optimizer.step()
            if step == 4:
                fresh = kind(shards.parameters(), rank=4, **settings)
                set_optimizer_state_dict(shards, fresh, get_optimizer_state_dict(shards, two))
                two = fresh
        for p, q in zip(alone.parameters(), shards.parameters(), strict=True):
            assert isinstance(q, DTensor)
            difference = float((q.full_tensor() - p).detach().abs().max())
            assert difference <= 1e-9, (kind.__name__, settings, tuple(p.shape), difference)


ODD = {"nothing_held": nothing_held, "columns_refused": columns_refused}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"sharded": sharded, "replicas": replicas, "fsdp": fsdp, "float32": float32, **ODD}[sys.argv[1]]()
    dist.barrier()  # The first to leave would cut off the other's last exchange.
    dist.destroy_process_group()
